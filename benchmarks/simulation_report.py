"""The document of `benchmarks.simulation`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.process_tree import Mark
from benchmarks.simulation_job import Job
from benchmarks.simulation_runs import Run, Runs
from benchmarks.tables import spread

LONGER = (100, 500)  # rounds that costs are computed for


def report(job: Job, runs: Runs) -> str:
    lines = [
        "# Simulation: one federated job in FedFMSL's simulator and in Flower's",
        "",
        "Written by `python -m benchmarks.simulation --flower-python PATH`.",
        "",
        f"The job: {job.devices} devices, {job.fraction:.0%} of them in a round, 5,000 photos of CIFAR-10 at 140 px,",
        f"Dirichlet(α = {job.alpha:g}). DINOv2 ViT-S/14 with LoRA on query and value of the last block, a linear head",
        f"and FedAvg (FedIT). AdamW at {job.learning_rate:g}, {job.epochs} local epochs, batches of 16.",
        "",
        "- FedFMSL: method `fedit` of `fedfmsl simulate`, in one process.",
        "- Flower: `flwr[simulation]` 1.42 on Ray, with torch 2.13 and PEFT 0.21. An actor loads the model once.",
        "  Photos are decoded and normalized before the measured run; all actors map one file of fp32 tensors.",
        f"  Of the settings that were tried (below), the one with the least CPU time is used: {runs.best}.",
        "- Both have the same weights, initial LoRA and head, split, participants, batches, loss and optimizer.",
        "- CPU time is that of all processes. Memory is the sum over processes; shared pages count once.",
        "- FedFMSL decodes the photos in the measured run, computes the initial head from class means, and computes",
        "  the features of the held-out fifth of the photos, which no device trains on. Flower does none of this.",
        "- The test photos are evaluated outside the measured part, by the same code for both.",
        "",
        "## Cost of a round",
        "",
        *_table(
            ("", "CPU s before round 1", "CPU s per round", "of it training", "wall s per round", "peak MB"),
            [_costs(name, run) for name, run in _rows(runs).items()],
        ),
        "",
        "Means over all rounds but the first, in which Flower's actors load the model. Training is the devices' own",
        "forward and backward passes; the rest of a round is the simulator's.",
        "",
        *_gain(runs),
        "",
        f"## Cost of the same accuracy, {runs.common:.3f}",
        "",
        f"The highest that all reach in {runs.flower.rounds} rounds, which is as far as Flower was run.",
        "The target is 50 times less CPU.",
        "",
        *_equal(runs),
        "",
        "Features kept is the run of another seed, after as many rounds as the first run. If Flower keeps its stored",
        f"states as well, FedFMSL takes {_both_kept(runs):.0f} times less CPU.",
        "",
        "Flower computes the frozen blocks in every step, FedFMSL once. The gain therefore grows with the rounds, and",
        "with every further run on the same photos: another seed, learning rate or method. CPU seconds, with the",
        "measured cost of a round:",
        "",
        *_longer(runs),
        "",
        "## Accuracy",
        "",
        *_accuracy(runs),
        "",
        "## Settings of Flower",
        "",
        *_table(
            ("", "CPU s per round", "wall s per round", "peak MB"),
            [[name, *_cells(run.per_round), f"{run.usage.peak_mb:.0f}"] for name, run in runs.tried.items()],
        ),
    ]
    return "\n".join(lines) + "\n"


def _rows(runs: Runs) -> dict[str, Run]:
    return {
        "FedFMSL, first run": runs.ours[0],
        "FedFMSL, features kept": runs.ours[1],
        "FedFMSL, int8 weights, first run": runs.int8,
        "Flower": runs.flower,
        "Flower, frozen blocks stored by hand": runs.cached,
        "Flower, LoRA in all blocks": runs.whole,
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _cells(mark: Mark) -> list[str]:
    return [f"{mark.processor:.2f}", f"{mark.wall:.2f}"]


def _costs(name: str, run: Run) -> list[str]:
    each = run.per_round
    return [
        name,
        f"{run.start.processor:.0f}",
        f"{each.processor:.2f}",
        f"{each.training:.2f}",
        f"{each.wall:.2f}",
        f"{run.usage.peak_mb:.0f}",
    ]


def _gain(runs: Runs) -> list[str]:
    ours, flower, cached = (run.per_round for run in (runs.ours[0], runs.flower, runs.cached))
    rest = [each.processor - each.training for each in (ours, flower, cached)]
    return [
        f"A round takes {flower.processor / ours.processor:.0f} times less CPU in FedFMSL. Where this comes from:",
        "",
        "- Stored states of the frozen blocks: with them, Flower's training takes",
        f"  {flower.training / cached.training:.1f} times less.",
        f"- The engine, from the same states: training takes {cached.training / ours.training:.1f} times less with",
        "  step graphs of ONNX Runtime. They compute the last block for the class token only.",
        f"- The simulator: {rest[0]:.2f} CPU s of a round are not training. In Flower they are {rest[1]:.2f}, and",
        f"  {rest[2]:.2f} with stored states.",
        "",
        f"LoRA in all blocks is what PEFT does by default. It learns more in a round ({_last(runs.whole)}),",
        "but no block is frozen, so no states can be stored. The gain of the engine alone is in",
        "[the benchmarks](../docs/benchmarks.md#one-training-step).",
    ]


def _last(run: Run) -> str:
    return f"{run.accuracy[run.rounds]:.3f} after {run.rounds} rounds and {run.usage.processor:.0f} CPU s"


def _equal(runs: Runs) -> list[str]:
    reference = runs.flower.after(runs.flower.reaches(runs.common))
    rows = []
    for name, run in _rows(runs).items():
        known = [value for index, value in run.accuracy.items() if index <= runs.flower.rounds]
        if run is runs.ours[1]:  # of another seed, so of another accuracy: as many rounds as the first run
            index = runs.ours[0].reaches(runs.common)
        elif max(known) >= runs.common:
            index = run.reaches(runs.common)
        else:
            continue
        used = run.after(index)
        gain = reference.processor / used.processor, reference.wall / used.wall
        rows.append([name, str(index), f"{used.processor:.0f}", f"{gain[0]:.1f}", f"{used.wall:.0f}", f"{gain[1]:.1f}"])
    return _table(("", "rounds", "CPU s", "× less than Flower", "wall s", "× less than Flower"), rows)


def _both_kept(runs: Runs) -> float:
    """The ratio of CPU seconds if both have the states of an earlier run."""
    cached, ours = runs.cached, runs.ours[1].after(runs.ours[0].reaches(runs.common))
    states = next(mark for mark in cached.usage.marks if mark.name == "features").processor
    return (cached.after(cached.reaches(runs.common)).processor - states) / ours.processor


def _longer(runs: Runs) -> list[str]:
    rows = []
    for rounds in (runs.flower.rounds, *LONGER):
        flower, *others = (
            run.processor_after(rounds) for run in (runs.flower, runs.cached, runs.ours[0], runs.int8, runs.ours[1])
        )
        rows.append([str(rounds), f"{flower:.0f}", *(f"{each:.0f} ({flower / each:.1f} ×)" for each in others)])
    return _table(
        ("rounds", "Flower", "Flower, stored by hand", "FedFMSL, first run", "int8 weights", "features kept"), rows
    )


def _accuracy(runs: Runs) -> list[str]:
    ours, flower, whole = runs.ours[0], runs.flower, runs.whole
    difference = max(abs(ours.accuracy[index] - value) for index, value in flower.accuracy.items())
    rows = [
        [str(index), *(f"{run.accuracy[index]:.4f}" if index in run.accuracy else "" for run in _curves(runs))]
        for index in sorted({*ours.accuracy, *whole.accuracy})
    ]
    seeds = [run.accuracy[run.rounds] for run in runs.ours if run.rounds in run.accuracy]
    return [
        f"On the 2,000 test photos. The largest difference between FedFMSL and Flower is {difference:.4f}.",
        f"After {ours.rounds} rounds FedFMSL has {spread(seeds)} over {len(seeds)} seeds.",
        "",
        *_table(
            (
                "after round",
                "FedFMSL",
                "int8 weights",
                "Flower",
                "Flower, stored by hand",
                "Flower, LoRA in all blocks",
            ),
            rows,
        ),
    ]


def _curves(runs: Runs) -> tuple[Run, ...]:
    return runs.ours[0], runs.int8, runs.flower, runs.cached, runs.whole
