"""python -m export.hub: moves the folder of a global expert to and from the Hugging Face hub.

The token is that of `huggingface_hub`: HF_TOKEN, or the one that `hf auth login` has stored. It is never shown.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, logging, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from requests import RequestException

from fedfmsl.common.cli import application, console
from fedfmsl.common.whole_folder import read_folder
from fedfmsl.errors import ConfigError, InputError, WeightsError, one_line
from fedfmsl.protocol.image_processor import PREPROCESSOR

ADAPTER, CARD, LABELS = "adapter_model.safetensors", "README.md", "labels.json"
REQUIRED = ("adapter_config.json", ADAPTER, CARD, LABELS)
FILES = (*REQUIRED, PREPROCESSOR)
SHOWN_CLASSES = 20

app = application("Move a global expert to and from the Hugging Face hub.")


@app.command()
def push(
    repo: str = typer.Argument(help="Repository, like NAME/orchard. It is created if it does not exist."),
    folder: Path = typer.Option(help="Folder of the global expert, with its model card."),
    license_: str | None = typer.Option(
        None, "--license", help="Licence for the model card, like cc-by-4.0. Default: none is stated."
    ),
    public: bool = typer.Option(False, "--public", help="Everybody may read it. Default: private."),
    yes: bool = typer.Option(False, "--yes", help="Do not ask before anything is sent."),
) -> None:
    """Upload a global expert. First says what leaves this machine: weights, class names and figures."""
    with hub_errors(repo, "push"):
        validate_repo_id(repo)
    files = _read(folder)
    try:
        if license_:
            files[CARD] = with_license(files[CARD], license_)
        lines = list(leaving(files, repo, public))
    except (ValueError, AttributeError) as error:  # not JSON, not UTF-8, or no object
        raise InputError(f"{LABELS} or {CARD} in {folder} is damaged ({one_line(error)}); export it again") from error
    token = get_token()
    if token is None:
        raise ConfigError("there is no token of the hub; set HF_TOKEN, or run: hf auth login")
    for line in lines:
        console.print(line)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("nothing was sent: push asks before it sends; pass --yes to answer beforehand")
        typer.confirm("Send this?", abort=True)
    api = HfApi(constants.ENDPOINT, token)
    with hub_errors(repo, "push"):
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise ConfigError(f"nothing was sent: {repo} is public; pass --public, or choose another repository")
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        commit = api.create_commit(repo, operations, commit_message="Global expert of a FedFMSL Edge run")
    console.print(f"pushed to {constants.ENDPOINT}/{repo} at {commit.oid[:12]}")


@app.command()
def pull(
    repo: str = typer.Argument(help="Repository, like NAME/orchard."),
    to: Path = typer.Option(help="Folder to write to."),
    revision: str = typer.Option("main", help="Branch, tag or commit."),
) -> None:
    """Download a global expert: the folder that PeftModel.from_pretrained reads."""
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to {to} is a file; pass a folder")
    with hub_errors(repo, "pull"):
        commit = HfApi(constants.ENDPOINT).model_info(repo, revision=revision).sha
        snapshot_download(repo, revision=commit, local_dir=to, allow_patterns=list(FILES))
    missing = [name for name in REQUIRED if not (to / name).is_file()]
    if missing:
        raise InputError(f"{repo} at {revision} is not a global expert of FedFMSL: it has no {missing[0]}")
    print(to)


def leaving(files: dict[str, bytes], repo: str, public: bool) -> Iterator[str]:
    """What a push sends, a line each."""
    names = list(json.loads(files[LABELS]).values())
    more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    results = re.findall(r"^(?:Accuracy|Measured|- \d+ rounds).*", files[CARD].decode(), re.MULTILINE)
    who = "everybody may read it" if public else "private"
    yield f"to {constants.ENDPOINT}/{repo} ({who}):"
    yield f"  weights       {ADAPTER}, {len(files[ADAPTER]) / 1e3:,.0f} KB: trained on the devices' samples"
    yield f"  class names   {', '.join(names[:SHOWN_CLASSES])}{more}"
    for result in results:
        yield f"  figures       {result.removeprefix('- ')}"
    yield f"  other files   {', '.join(name for name in files if name not in (ADAPTER, LABELS))}"


def with_license(card: bytes, name: str) -> bytes:
    """The model card with this licence in its metadata. Raises ValueError if it has no metadata."""
    if not re.fullmatch(r"[a-z0-9.-]+", name):
        raise ConfigError(f"--license {one_line(name)!r} is not an identifier of the hub, like apache-2.0 or cc-by-4.0")
    found = re.fullmatch(r"---\n(.*?\n)---\n(.*)", card.decode(), re.DOTALL)
    if found is None:
        raise ValueError("it has no metadata between lines ---, where the licence belongs")
    metadata = re.sub(r"^license: .*\n", "", found[1], flags=re.MULTILINE)
    return f"---\nlicense: {name}\n{metadata}---\n{found[2]}".encode()


def _read(folder: Path) -> dict[str, bytes]:
    """The files of a global expert by name. Raises InputError."""
    try:
        there = read_folder(folder)
    except OSError as error:
        raise _no_expert(folder, error.strerror or "") from error
    if missing := [name for name in REQUIRED if name not in there]:
        raise _no_expert(folder / missing[0], "No such file")
    return {name: there[name] for name in FILES if name in there}


def _no_expert(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be read ({why}); pass the global_expert folder of a run, or one of "
        "python -m trainer_server export"
    )


@contextmanager
def hub_errors(repo: str, what: str) -> Iterator[None]:
    """Errors of the hub's client as one line with a remedy, and none of its own lines."""
    logging.set_verbosity_error()
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{one_line(repo)!r} is not a name of a repository; write it like NAME/orchard") from error
    except OfflineModeIsEnabled as error:
        raise WeightsError("HF_HUB_OFFLINE is set, so nothing connects to the hub; unset it") from error
    except HfHubHTTPError as error:
        if error.response is None:
            raise _no_answer(repo, what) from error
        raise WeightsError(f"cannot {what} {repo}: {_reason(error, error.response.status_code)}") from error
    except RequestException as error:
        raise _no_answer(repo, what) from error
    except (RuntimeError, ValueError) as error:  # of an upload, and of a model card that the hub refuses
        raise WeightsError(f"cannot {what} {repo}: {one_line(error.__cause__ or error)}; repeat the command") from error


def _no_answer(repo: str, what: str) -> WeightsError:
    return WeightsError(
        f"cannot {what} {repo}: the hub does not answer at {constants.ENDPOINT}; check the network, and repeat the "
        "command: it goes on where it ended"
    )


def _reason(error: HfHubHTTPError, status: int) -> str:
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision; check --revision"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return "there is no such repository, or the token may not see it; check its name and HF_TOKEN"
    if status == 401:
        return "the hub does not accept the token; renew it with hf auth login, or set HF_TOKEN"
    if status == 403:
        return "the token may not do this (403); it needs the right to write to this repository"
    return f"{one_line(error.server_message or error)} ({status}); repeat the command"


if __name__ == "__main__":
    app()
