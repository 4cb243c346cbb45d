"""The federated job of `benchmarks.simulation` in Flower's simulation: torch + PEFT clients on Ray.

Runs in an environment of its own, without this project's packages. It imports flwr, torch, peft, transformers and numpy
only. `benchmarks.simulation` starts it and describes the files that it reads and the lines that it prints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import LoraConfig, get_peft_model
from transformers import Dinov2Model

FEATURE_BATCH = 16


@dataclass(frozen=True)
class Variant:
    """`level`: the number of blocks with LoRA, from the last. `cached`: the frozen blocks below them run once for each
    image, not in every step. `actors` processes train one client each at a time, with `threads` threads each."""

    folder: str
    out: str
    rounds: int
    level: int
    bf16: bool
    cached: bool
    actors: int
    threads: int


class Classifier(torch.nn.Module):  # type: ignore[misc]
    """DINOv2 with PEFT's LoRA on the last blocks, and a linear classifier on the class token."""

    def __init__(self, job: dict[str, Any], level: int) -> None:
        super().__init__()
        backbone = Dinov2Model.from_pretrained(job["weights"])
        blocks = backbone.config.num_hidden_layers
        self.first = blocks - level
        self.backbone = get_peft_model(
            backbone,
            LoraConfig(
                r=job["rank"],
                lora_alpha=job["alpha"],
                target_modules=job["targets"],
                layers_to_transform=list(range(self.first, blocks)),
                layers_pattern="layer",
            ),
        )
        self.classifier = torch.nn.Linear(backbone.config.hidden_size, job["classes"])
        found = {
            name.removeprefix("backbone.base_model.model.").replace(".default", ""): parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        self.trained = {name: found[name] for name in job["layout"] if name in found}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        states = self.backbone(pixel_values=pixels).last_hidden_state
        return self.classifier(states[:, 0])

    def prefix(self, pixels: torch.Tensor) -> torch.Tensor:
        """The states (B, N, D) below the first block with LoRA."""
        model = self.backbone.base_model.model
        hidden = model.embeddings(pixels)
        for block in model.encoder.layer[: self.first]:
            hidden = _tensor(block(hidden))
        return hidden

    def suffix(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of states (B, N, D) below the first block with LoRA."""
        model = self.backbone.base_model.model
        for block in model.encoder.layer[self.first :]:
            hidden = _tensor(block(hidden))
        return self.classifier(model.layernorm(hidden)[:, 0])

    def set(self, arrays: Iterable[np.ndarray[Any, Any]]) -> None:
        with torch.no_grad():
            for parameter, array in zip(self.trained.values(), arrays, strict=True):
                parameter.copy_(torch.from_numpy(array))


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@cache  # a client's model and data are loaded once in each actor
def load(variant: Variant) -> tuple[dict[str, Any], Classifier, Any, Any]:
    """The job, the model, the inputs (n, …) of its forward pass, and the labels (n,)."""
    torch.set_num_threads(variant.threads)
    folder = Path(variant.folder)
    job = json.loads((folder / "job.json").read_text())
    inputs = Path(variant.out) / "hidden.npy" if variant.cached else folder / "pixels.npy"
    return job, Classifier(job, variant.level), np.load(inputs, mmap_mode="r"), np.load(folder / "labels.npy")


def train(variant: Variant, device: str, index: int, arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """The arrays after the steps of a device in round `index`, from 0."""
    job, model, inputs, labels = load(variant)
    model.train()
    model.set(arrays)
    head = {id(parameter) for parameter in model.classifier.parameters()}
    lora = [parameter for parameter in model.trained.values() if id(parameter) not in head]
    groups = [{"params": lora}, {"params": list(model.classifier.parameters()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job["learning_rate"], weight_decay=job["weight_decay"])
    bias = torch.tensor(job["bias"][device])
    for rows in job["rounds"][index][device]:
        batch = torch.from_numpy(inputs[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.bf16):
            logits = model.suffix(batch) if variant.cached else model(batch)
        loss = torch.nn.functional.cross_entropy(logits.float() + bias, torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [parameter.detach().numpy() for parameter in model.trained.values()]


client = ClientApp()


@client.train()  # type: ignore[untyped-decorator]
def train_client(message: Message, context: Context) -> Message:
    config = message.content["config"]
    variant, device, index = Variant(**json.loads(config["variant"])), config["device"], config["index"]
    load(variant)
    started = time.process_time()
    arrays = train(variant, device, index, message.content["arrays"].to_numpy_ndarrays())
    seconds, samples = time.process_time() - started, load(variant)[0]["samples"][device]
    metrics = MetricRecord({"num-examples": samples, "seconds": seconds})
    return Message(content=RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


class Assigned(FedAvg):  # type: ignore[misc]
    """FedAvg in which the job's participants of a round are assigned to the sampled nodes."""

    def __init__(self, job: dict[str, Any], variant: Variant, **options: Any) -> None:
        super().__init__(**options)
        self.job, self.variant, self.seconds = job, variant, 0.0

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        common = {"variant": json.dumps(asdict(self.variant)), "index": server_round - 1}
        for message, device in zip(messages, self.job["rounds"][server_round - 1], strict=True):
            own = ConfigRecord({**common, "device": device})
            message.content = RecordDict({"arrays": arrays, "config": own})
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        answers = list(replies)
        for answer in answers:
            if answer.has_error():
                raise RuntimeError(answer.error.reason)
            self.seconds += answer.content["metrics"]["seconds"]
        return super().aggregate_train(server_round, answers)


def mark(name: str, seconds: float = 0.0) -> None:
    print(json.dumps({"name": name, "training": seconds}), flush=True)


def main(text: str) -> None:
    """`text`: a `Variant` as JSON."""
    variant = Variant(**json.loads(text))
    folder, out = Path(variant.folder), Path(variant.out)
    job = json.loads((folder / "job.json").read_text())
    if variant.cached:
        store_states(job, variant, np.load(folder / "pixels.npy", mmap_mode="r"), out / "hidden.npy")
    mark("features")
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def serve(grid: Grid, context: Context) -> None:
        model, theta = Classifier(job, variant.level), np.load(folder / f"start-{variant.level}.npy")
        shapes = [tuple(parameter.shape) for parameter in model.trained.values()]
        parts = np.split(theta, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
        start = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        count = len(job["rounds"][0])
        strategy = Assigned(
            job,
            variant,
            fraction_train=count / job["devices"],
            fraction_evaluate=0.0,
            min_train_nodes=count,
            min_available_nodes=job["devices"],
        )

        def after_round(index: int, arrays: Any) -> None:
            flat = np.concatenate([array.ravel() for array in arrays.to_numpy_ndarrays()])
            np.save(out / f"theta-{index}.npy", flat)
            mark(f"round {index}", strategy.seconds)

        strategy.start(grid, ArrayRecord(start), variant.rounds, evaluate_fn=after_round)

    cores = variant.actors * variant.threads
    backend = {
        "client_resources": {"num_cpus": variant.threads, "num_gpus": 0.0},
        "init_args": {"num_cpus": cores},
    }
    run_simulation(server, client, job["devices"], backend_config=backend)


def store_states(job: dict[str, Any], variant: Variant, pixels: Any, path: Path) -> None:
    """The states below the first block with LoRA of all images, in fp32. With as many threads as the actors have."""
    torch.set_num_threads(variant.threads)
    model = Classifier(job, variant.level)

    def states(start: int) -> np.ndarray[Any, Any]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=variant.bf16):
            batch = torch.from_numpy(pixels[start : start + FEATURE_BATCH])
            return model.prefix(batch).float().numpy()  # type: ignore[no-any-return]

    table = np.lib.format.open_memmap(path, "w+", np.float32, (len(pixels), *states(0).shape[1:]))
    starts = range(0, len(pixels), FEATURE_BATCH)
    with ThreadPoolExecutor(variant.actors) as pool:
        for start, part in zip(starts, pool.map(states, starts), strict=True):
            table[start : start + FEATURE_BATCH] = part
