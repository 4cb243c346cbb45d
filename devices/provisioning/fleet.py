"""The folder of a fleet: CA, broker kit, and an identity or a password for every member.

PKI/ca.key              the CA's key, which signs; never copy it to the broker or a device
PKI/fedfmsl-server.service      systemd unit of the run's server
PKI/server.pem          identity file of the run's server (--identity)
PKI/operator.pem        identity file of the operator (--identity of trainer_server purge)
PKI/operators/NAME.pem, .p12    the same for one person, and for that person's browser
PKI/devices/NAME.toml   a device's settings and identity: copy it to the device, for devices.install (or as --identity)
PKI/homeassistant.crt, .key     Home Assistant's, if it is among the names
PKI/issued/NAME.crt     all certificates of a member, of the server and of the broker, so that they can be revoked
PKI/tokens/NAME.json    the one-time token of a device that makes its key itself (see `devices.provisioning.enrollment`)
PKI/fleet.toml          run, broker and authority for devices that are added later
PKI/lock                held by the process that issues or revokes certificates
PKI/broker/             the kit: copy it to the broker
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from devices.provisioning.authority import (
    CLIENT,
    CONSOLE,
    SERVER,
    Authority,
    Issued,
    hosts_of,
    load_authority,
    make_authority,
    name_of,
    revoked_serials,
    serials_of,
)
from devices.provisioning.broker_kit import acl, mosquitto_conf, new_password, password_line, systemd_limits
from devices.provisioning.compose import compose_yaml
from devices.provisioning.service_unit import SERVER as SERVER_UNIT
from devices.provisioning.service_unit import server_unit
from devices.provisioning.settings_file import read_table, settings_text
from fedfmsl.common.files import write_atomically
from fedfmsl.common.lock_file import held
from fedfmsl.common.settings import without_secrets
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.topics import ROOT, check_name, check_prefix
from fedfmsl.transport.address import PORTS, netloc, parse_address
from fedfmsl.transport.settings import HOME_ASSISTANT, OPERATOR_NAME, SERVER_NAME

BROKER_NAME = "broker"  # of --renew
RESERVED = (SERVER_NAME, OPERATOR_NAME, BROKER_NAME)  # names that no device may have
SOURCE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fleet:
    """The CA, the broker kit and the members of a fleet, in one folder.

    `report` receives a line for every written file, and for every step that is left to the operator.
    """

    folder: Path
    report: Callable[[str], None]

    @property
    def exists(self) -> bool:
        return (self.folder / "ca.key").is_file()

    @property
    def has_passwords(self) -> bool:
        """Whether members have passwords instead of certificates."""
        return self._passwords.is_file()

    def locked(self) -> AbstractContextManager[None]:
        """Waits for other processes and threads that issue or revoke certificates."""
        return held(self.folder / "lock", wait=True)

    def settings(
        self, hosts: Sequence[str], run: str | None, broker: str | None, prefix: str | None = None
    ) -> dict[str, str]:
        """Run, broker, topic prefix and authority that devices get: the arguments, else the stored values.

        Raises ConfigError if they are invalid.
        """
        path = self.folder / "fleet.toml"
        stored = read_table(path) if path.is_file() else {}
        found = {"run": run or stored.get("run"), "broker": broker or stored.get("broker")}
        found |= {"topic_prefix": prefix or stored.get("topic_prefix"), "authority": stored.get("authority")}
        if hosts:
            found["broker"] = broker or f"mqtts://{netloc(hosts[0])}"
        settings = {key: value for key, value in found.items() if value}
        if "broker" not in settings:
            raise ConfigError(f"{self.folder} has no broker address; pass --broker, like mqtts://fleet.example")
        if not parse_address(settings["broker"]).encrypted:
            raise ConfigError(
                f"--broker {without_secrets(settings['broker'])}: the kit's broker speaks TLS only; pass mqtts:// or wss://"
            )
        if run:
            check_name("run", run)
        if prefix:
            check_prefix(prefix)
            if not hosts and prefix != stored.get("topic_prefix", ROOT):
                raise ConfigError(
                    f"--topic-prefix {prefix}: the kit's access rules are for {stored.get('topic_prefix', ROOT)}; "
                    "give it with --host, in another --pki"
                )
        return settings

    def store_settings(self, settings: Mapping[str, str]) -> None:
        text = settings_text(("Settings of devices that are added later.", settings))
        write_atomically(self.folder / "fleet.toml", text.encode(), durable=True)

    def create(self, hosts: Sequence[str], kit: Path, passwords: bool, settings: Mapping[str, str]) -> None:
        """Makes CA, broker kit and the server's identity. The broker will read the kit from the folder `kit`."""
        broker, prefix = self.folder / "broker", settings.get("topic_prefix", ROOT)
        if (self.folder / "ca.key").exists():
            raise ConfigError(f"{self.folder} already holds a CA; omit --host to add devices, or choose another --pki")
        authority = make_authority("FedFMSL fleet")
        try:
            issued = authority.issue(hosts[0], [SERVER], hosts)
        except ValueError as error:
            raise ConfigError(f"--host {' '.join(hosts)}: {error}; pass a host's name or address") from error
        self._write(broker / "ca.crt", authority.certificate_pem)
        self._write(broker / "broker.crt", issued.certificate_pem)
        self._write(broker / "broker.key", issued.key_pem)
        self._write(broker / "revoked.crl", authority.revocation_list([]))
        self._write(broker / "acl", acl(prefix))
        address = parse_address(settings["broker"])
        port = PORTS["mqtts"] if address.websocket else address.port  # the kit's WebSocket listener is a comment
        self._write(broker / "mosquitto.conf", mosquitto_conf(kit, passwords, port))
        self._write(broker / "limits.conf", systemd_limits())
        self._write(broker / "compose.yaml", compose_yaml(kit, hosts[0], settings.get("run"), SOURCE, prefix, port))
        self.record(BROKER_NAME, issued.certificate_pem)
        self._issue_server(authority, hosts)
        self._issue_operator(authority)
        self._write(self.folder / f"{SERVER_UNIT}.service", server_unit(Path(sys.executable)))
        if passwords:
            self._write(self._passwords, "")
            self._add_passwords([SERVER_NAME, OPERATOR_NAME], settings)
        self._write(self.folder / "ca.crt", authority.certificate_pem)
        self._write(self.folder / "ca.key", authority.key_pem)  # last: `exists` depends on it

    def add(self, names: Sequence[str], settings: Mapping[str, str]) -> None:
        """Makes the members' identities or passwords."""
        if self.has_passwords:
            self._add_passwords(names, settings)
            return
        authority = self.authority()
        for name in names:
            issued = authority.issue(name, [CLIENT])
            self.check_free(name)
            self.record(name, issued.certificate_pem)
            if name == HOME_ASSISTANT:  # reads key and certificate from two files
                self._write(self.folder / f"{name}.crt", issued.certificate_pem)
                self._write(self.folder / f"{name}.key", issued.key_pem)
            else:
                self._write_device(name, settings, {"identity": _identity(issued, authority)})

    def add_operators(self, names: Sequence[str]) -> None:
        """Makes the certificates of persons. They open the console; at the broker all are `operator`."""
        authority = self.authority()
        for name in names:
            self.check_free(name)
            self._issue_operator(authority, name)

    def check_free(self, name: str) -> None:
        """Raises ConfigError if a member has the name."""
        if self.issued(name).exists():
            raise ConfigError(
                f"{self.issued(name)} already exists and is not overwritten; --renew or --revoke {name} first"
            )

    def renew(self, names: Sequence[str], settings: Mapping[str, str]) -> None:
        """Makes new certificates, of the server and the broker too. The earlier ones stay valid until they expire, so
        no connection is cut. Raises ConfigError for an unknown name."""
        authority = self.authority()
        known = self.folder / "broker" / "broker.crt"
        for name in names:
            if name == BROKER_NAME:
                hosts = hosts_of(known.read_bytes())
                issued = authority.issue(hosts[0], [SERVER], hosts)
                self.record(name, issued.certificate_pem)
                self._replace(known, issued.certificate_pem)
                self._replace(known.with_suffix(".key"), issued.key_pem)
                self.report("copy both to the broker, and reload it: systemctl reload mosquitto")
            elif name == SERVER_NAME:
                self._issue_server(authority, hosts_of(known.read_bytes()))
                self.report(
                    "copy it to the server; --serve uses it at once, the connection to the broker after a restart"
                )
            elif self.is_operator(name):
                self._issue_operator(authority, name)
            elif self.has_passwords:
                raise ConfigError(f"{name} has a password, which does not expire; --revoke it, and add {name} again")
            elif not self.issued(name).exists():
                raise ConfigError(f"cannot renew {name}; valid names are those in {self.folder}/issued")
            else:
                self._renew_member(name, authority.issue(name, [CLIENT]), authority, settings)
            if name in (SERVER_NAME, OPERATOR_NAME) and self.has_passwords and name not in self._users():  # revoked
                self._add_passwords([name], settings)

    def _renew_member(self, name: str, issued: Issued, authority: Authority, settings: Mapping[str, str]) -> None:
        self.record(name, issued.certificate_pem)
        if name == HOME_ASSISTANT:
            self._replace(self.folder / f"{name}.crt", issued.certificate_pem)
            self._replace(self.folder / f"{name}.key", issued.key_pem)
            return
        path = self.folder / "devices" / f"{name}.toml"
        self._replace(path, device_file(name, settings, {"identity": _identity(issued, authority)}))
        self.report(f"copy it to {name}, and run there: python -m devices.install --renew {path.name}")

    def revoke(self, names: Sequence[str]) -> None:
        """Revokes the members' certificates or passwords, all that they ever had, and their tokens. Raises ConfigError
        for an unknown name."""
        if BROKER_NAME in names:
            raise ConfigError(
                "devices read no revocation list; if the broker's key is stolen, make a new CA with --host in another "
                "--pki, and give all members new identities"
            )
        users = self._users() & set(names) if self.has_passwords else set()
        certified = [name for name in names if self.issued(name).is_file()]
        asked = [name for name in names if self.token(name).is_file()]
        if missing := [name for name in names if name not in (*users, *certified, *asked)]:
            places = f"{self.folder}/issued" + (f" and {self._passwords}" if self.has_passwords else "")
            raise ConfigError(
                f"cannot revoke {', '.join(missing)}: it is revoked already or was never made; valid names are those "
                f"in {places}"
            )
        for name in asked:  # first: an interruption leaves no free name with a valid token
            self.token(name).unlink()
            if name not in certified:
                self.report(f"the token of {name} is no longer valid")
        if users:
            self._remove_passwords(sorted(users))
            self.report(f"wrote {self._passwords}; copy it to the broker and restart the broker")
        if certified:
            self._revoke_certificates(certified)
        for name in sorted({SERVER_NAME, OPERATOR_NAME} & set(names)):
            self.report(f"the {name} needs another identity: --renew {name}")

    def _revoke_certificates(self, names: Sequence[str]) -> None:
        path = self.folder / "broker" / "revoked.crl"
        certificates = [self.issued(name) for name in names]
        try:
            serials = revoked_serials(path.read_bytes())
            serials += [serial for file in certificates for serial in serials_of(file.read_bytes())]
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(
                f"cannot revoke {', '.join(names)}: {error}; valid names are those in {self.folder}/issued"
            ) from error
        # before the certificates are removed, so that an interrupted call can be repeated
        write_atomically(path, self.authority().revocation_list(serials).encode(), durable=True, keep_owner=True)
        for name, file in zip(names, certificates, strict=True):
            file.unlink()
            self._remove_files(name)
        self.report(
            f"wrote {path}; copy it to the server, and to the broker and restart the broker, which also ends open "
            "connections"
        )

    # passwords

    @property
    def _passwords(self) -> Path:
        return self.folder / "broker" / "passwords"

    def _add_passwords(self, names: Sequence[str], settings: Mapping[str, str]) -> None:
        """Writes a device's password to its file, and reports the others."""
        lines = self._password_lines()
        if taken := self._users() & set(names):
            raise ConfigError(
                f"{self._passwords} already has {', '.join(sorted(taken))}; --revoke first, or choose another name"
            )
        for name in names:
            password = new_password()
            lines.append(password_line(name, password))
            if name in (SERVER_NAME, OPERATOR_NAME, HOME_ASSISTANT):
                self.report(f"{name} {password}")
                continue
            parts = urlsplit(settings["broker"])
            host = parts.netloc.rpartition("@")[2]
            address = parts._replace(netloc=f"{quote(name)}:{quote(password, safe='')}@{host}").geturl()
            authority = (self.folder / "ca.crt").read_text("utf-8")
            self._write_device(name, {**settings, "broker": address}, {"device": name, "identity": authority})
        self._replace_passwords(lines)

    def _remove_passwords(self, names: Sequence[str]) -> None:
        lines = self._password_lines()
        self._replace_passwords([line for line in lines if _user(line) not in names])
        for name in names:
            self._remove_files(name)

    def _users(self) -> set[str]:
        return {_user(line) for line in self._password_lines()}

    def _password_lines(self) -> list[str]:
        return self._passwords.read_text("utf-8").splitlines(keepends=True)

    def _replace_passwords(self, lines: Sequence[str]) -> None:
        write_atomically(self._passwords, "".join(lines).encode(), durable=True, keep_owner=True)

    # files

    def authority(self) -> Authority:
        try:
            return load_authority((self.folder / "ca.crt").read_bytes(), (self.folder / "ca.key").read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.folder} holds no readable CA ({error}); make one with --host in another --pki"
            ) from error

    def _write_device(self, name: str, settings: Mapping[str, str], own: Mapping[str, str]) -> None:
        path = self.folder / "devices" / f"{name}.toml"
        self._write(path, device_file(name, settings, own))
        self.report(f"copy it to {name}, and run there: python -m devices.install {path.name} --images DIR")

    def _remove_files(self, name: str) -> None:
        special = {HOME_ASSISTANT: [f"{name}.crt", f"{name}.key"]}
        special |= {own: [f"{own}.pem"] for own in (SERVER_NAME, OPERATOR_NAME)}
        files = special.get(name, [f"devices/{name}.toml", f"operators/{name}.pem", f"operators/{name}.p12"])
        for file in files:
            (self.folder / file).unlink(missing_ok=True)

    def token(self, name: str) -> Path:
        return self.folder / "tokens" / f"{name}.json"

    def issued(self, name: str) -> Path:
        return self.folder / "issued" / f"{name}.crt"

    def record(self, name: str, certificate: str) -> None:
        """To be called first, so that every certificate that is handed out can be revoked."""
        path = self.issued(name)
        earlier = path.read_text("utf-8") if path.exists() else ""
        write_atomically(path, (earlier + certificate).encode(), durable=True)

    def _issue_server(self, authority: Authority, hosts: Sequence[str]) -> None:
        """The server also serves the bundle over HTTPS, under the broker's host names."""
        issued = authority.issue(SERVER_NAME, [SERVER, CLIENT], hosts)
        self.record(SERVER_NAME, issued.certificate_pem)
        self._replace(self.folder / "server.pem", _identity(issued, authority))

    def is_operator(self, name: str) -> bool:
        """Whether it is the operator that every fleet has, or a person."""
        issued = self.issued(name)
        return name == OPERATOR_NAME or (issued.is_file() and name_of(issued.read_bytes()) == OPERATOR_NAME)

    def _issue_operator(self, authority: Authority, name: str = OPERATOR_NAME) -> None:
        """A person also gets a file for the browser."""
        path = self.folder / ("operator.pem" if name == OPERATOR_NAME else f"operators/{name}.pem")
        issued = authority.issue(OPERATOR_NAME, [CLIENT, CONSOLE], unit="" if name == OPERATOR_NAME else name)
        self.record(name, issued.certificate_pem)
        self._replace(path, _identity(issued, authority))
        if name != OPERATOR_NAME:
            password, browser = new_password(), path.with_suffix(".p12")
            write_atomically(browser, issued.pkcs12(f"{name}, operator", password), durable=True)
            self.report(f"wrote {browser}; import it in {name}'s browser, with the password {password}")

    def _replace(self, path: Path, text: str) -> None:
        """Its owner may be the user of a broker or server that reads it here, as in containers."""
        write_atomically(path, text.encode(), durable=True, keep_owner=True)
        self.report(f"wrote {path}")

    def _write(self, path: Path, text: str) -> None:
        """Raises ConfigError if the file exists: devices in the field may depend on it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise ConfigError(
                f"{path} already exists and is not overwritten; remove it first, or choose another name"
            ) from error
        self.report(f"wrote {path}")


def device_file(name: str, settings: Mapping[str, str], own: Mapping[str, str]) -> str:
    """The text of a device's file. `own`: its identity, and what else only this device has."""
    about = f"The identity of {name} and the CA that it trusts. With the key it is secret: it belongs on {name} only."
    return settings_text((f"Written by devices.provision for {name}.", settings), (about, own))


def _identity(issued: Issued, authority: Authority) -> str:
    return issued.key_pem + issued.certificate_pem + authority.certificate_pem


def _user(line: str) -> str:
    """The user name in a line of the password file."""
    return line.partition(":")[0]
