"""python -m export, or fedfmsl export: exports a backbone, and makes tasks for it. `push` and `pull` are for a global
expert and the hub."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from export.build import build
from export.hub import pull, push
from export.task import make_task
from fedfmsl.common.cli import application


class BuildByDefault(TyperGroup):
    """Options without a command are those of `build`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["build", *args])


app = application(
    "Export a frozen backbone as a bundle for edge devices; move a global expert to and from the Hugging Face hub.",
    cls=BuildByDefault,
)
for command in (build, push, pull):
    app.command()(command)
app.command("task")(make_task)

if __name__ == "__main__":
    app()
