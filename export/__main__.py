"""python -m export, or fedfmsl export: exports a backbone, and makes tasks for it. `push` and `pull` are for a global
expert and the hub."""

from __future__ import annotations

from typing import Any

from fedfmsl.common.lazy_group import LazyCommand, LazyGroup, commands_in, lazy_group

HUB = {
    "push": "Upload a global expert. First says what leaves this machine: weights, class names and figures.",
    "pull": "Download a global expert: the folder that PeftModel.from_pretrained reads.",
}
COMMANDS = {
    "build": LazyCommand("export.build", "export", "Export a frozen backbone as a bundle for edge devices."),
    **commands_in("export.hub", "export", HUB),
    "task": LazyCommand(
        "export.task",
        "export",
        "Write the task of a run over a bundle: class names, and a zero-shot head if the model has a text tower.",
    ),
}


class BuildByDefault(LazyGroup):
    """Options without a command are those of `build`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.lazy or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["build", *args])


app = lazy_group(
    "Export a frozen backbone as a bundle for edge devices; move a global expert to and from the Hugging Face hub.",
    COMMANDS,
    kind=BuildByDefault,
)

if __name__ == "__main__":
    app()
