"""Records a run on one broker and replays the server's messages on another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfmsl.protocol.chunks import MAX_BLOB_BYTES, Assembler, chunks
from fedfmsl.protocol.messages import Ack, Progress, Round, ServerStatus, Update, Verdict, encode, parse
from fedfmsl.protocol.tensors import unpack
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link
from support.processes import Broker, Observer


@dataclass(frozen=True)
class Answer:
    """A device's update: header and tensors."""

    header: Update
    tensors: dict[str, NDArray[np.generic]]


class Recorder(Observer):
    """An observer that also keeps progress messages, and updates by device and round."""

    def __init__(self, broker: Broker, run: str) -> None:
        self.answers: dict[tuple[str, int], Answer] = {}
        super().__init__(broker, run)

    def keep(self, topic: str, payload: bytes) -> None:
        super().keep(topic, payload)
        upload, device = self._topics.update_of(topic), self._topics.device_of(topic)
        if upload is not None:
            blob = self._assemblers.setdefault(topic.rpartition("/")[0], Assembler(MAX_BLOB_BYTES)).add(payload)
            if blob is not None:
                self.answers[upload] = Answer(*unpack(blob, Update))
                self.seen.append(self.answers[upload].header)
        elif device is not None and topic == self._topics.progress(device):
            self.seen.append(parse(Progress, payload))

    @property
    def rounds(self) -> list[Round]:
        """The announced rounds, each once."""
        return list({message.round: message for message in self.seen if isinstance(message, Round)}.values())


def replay(recorded: Recorder, device: str, broker: Broker, recorder: Recorder) -> None:
    """Publishes the recorded announcements and globals, byte for byte, on another `broker` that `recorder` observes.
    Each round follows the device's update for the one before."""
    status = next(message for message in recorded.seen if isinstance(message, ServerStatus) and message.online)
    topics, link = Topics(status.run), Link(broker.url, "replay")
    link.connect()
    link.publish(topics.server_status, encode(status), retain=True)
    *asked, finished = recorded.rounds
    for announced in asked:
        for sha256 in announced.blobs:
            for index, chunk in enumerate(chunks(recorded.blobs[sha256])):
                link.publish(topics.globals_chunk(sha256, index), chunk, retain=True)
        link.publish(topics.round, encode(announced), retain=True)
        answer = recorder.wait(Update, _answers(announced), f"the answer to round {announced.round}")
        ack = Ack(run=status.run, session=status.session, round=answer.round, device=device, verdict=Verdict.ACCEPTED)
        link.publish(topics.ack(device), encode(ack))
    link.close(link.publish(topics.round, encode(finished), retain=True))


def _answers(announced: Round) -> Callable[[Update], bool]:
    return lambda update: update.round == announced.round
