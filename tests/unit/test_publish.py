"""What leaves a device of its predictions, and which client ends if a broker allows one connection per identity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.brokers import RestartableBroker
from support.processes import Processes, wait_until

from devices.provisioning.broker_kit import password_line
from edge_runtime.inference.publish import Publisher, as_published
from edge_runtime.preflight import network
from edge_runtime.preflight.context import Context
from edge_runtime.settings import PredictSettings, Settings
from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BrokerError
from fedfmsl.protocol.messages import Prediction, parse
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link

QUICK = Backoff(first=1.0, longest=1.0)


def prediction_of(file: str, classes: int = 2, name: str = "class") -> Prediction:
    names = [f"{name}-{number:04d}" for number in range(classes)]
    probabilities = {each: number / sum(range(classes)) for number, each in enumerate(names)}
    values = {"label": names[-1], "confidence": probabilities[names[-1]], "probabilities": probabilities}
    return Prediction(device="model", file=file, time=1.5, round=3, **values)


@pytest.mark.parametrize("file", ["/home/anna/inbox/2026/cat.jpg", "cat.jpg", f"/{'deep/' * 700}cat.jpg"])
def test_a_published_prediction_has_the_name_of_its_file_and_no_folder(file: str) -> None:
    sent = parse(Prediction, as_published(prediction_of(file), "kitchen"))
    assert sent == prediction_of(file).model_copy(update={"device": "kitchen", "file": "cat.jpg"})


def test_a_prediction_of_many_long_classes_is_published_with_the_most_probable_ones() -> None:
    whole = prediction_of("cat.jpg", 4096, '"' * 240)
    sent = parse(Prediction, as_published(whole, "kitchen"))
    assert (
        list(sent.probabilities.items())
        == sorted(whole.probabilities.items(), key=lambda item: -item[1])[: len(sent.probabilities)]
    )
    assert sent.label in sent.probabilities and len(sent.probabilities) > 300


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """The address of a broker that allows one connection per user, as the broker kit's does per identity."""
    (tmp_path / "passwords").write_text(password_line("kitchen", "secret"))
    lines = ["allow_anonymous false", f"password_file {tmp_path / 'passwords'}", "use_username_as_clientid true"]
    with Processes(tmp_path / "logs") as processes:
        url = RestartableBroker(processes, tmp_path / "broker", lines=lines).url
        yield url.replace("//", "//kitchen:secret@")


@pytest.mark.needs("mosquitto")
def test_publishing_with_the_identity_of_a_running_daemon_ends(broker: str) -> None:
    topics, classifier = Topics("orchard"), SimpleNamespace(device="kitchen", classes=("apple", "plum"))
    daemon = Link(broker, topics.client_id("kitchen", "1"), reconnect=QUICK)
    daemon.connect()
    settings = PredictSettings(run="orchard", broker=broker)
    publisher = Publisher(classifier, settings, QUICK)  # type: ignore[arg-type]
    with pytest.raises(BrokerError, match=r"'kitchen' at once: a daemon .* set the daemon's `watch`"), publisher:
        wait_until(lambda: publisher.publish(None), "the error")  # type: ignore[func-returns-value]
    wait_until(lambda: not daemon.outage.since, "the daemon's connection")
    daemon.close()


@pytest.mark.needs("mosquitto")
def test_a_check_beside_a_daemon_with_the_same_identity_says_so(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SERVER_SECONDS", 2.5)
    daemon = Link(broker, "daemon", reconnect=QUICK)
    daemon.connect()
    settings = Settings(run="orchard", broker=broker, images=tmp_path, state=tmp_path)
    with pytest.raises(BrokerError, match="if a daemon with this identity runs elsewhere"):
        list(network.check_broker(settings, Context(tmp_path)))
    daemon.close()
