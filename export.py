"""The fourth command line: one folder of a trained model to use elsewhere, with a card that says how it was made.

    python export.py runs/look
    python export.py runs/look --checkpoint best --output look-model

Weights, files and card are made in fleet/export. Importing this file starts nothing.
"""

import sys
from collections.abc import Sequence

from fleet.command import command_line
from fleet.command.export_options import (
    output_folder,
    parse_export_options,
    require_hub,
    require_output_folder,
)
from fleet.export.trained_model import find_trained_model, folders_read

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Exports one model. Raises UsageError, before any weight loads, for what cannot be exported."""
    command_line.set_up_logging()
    options = parse_export_options(sys.argv[1:] if argv is None else argv)
    trained = find_trained_model(str(options.run), options.checkpoint)
    folder = output_folder(options, trained.run or trained.folder)
    require_output_folder(folder, folders_read(trained), overwrite=options.overwrite)
    require_hub(options.push_to_hub)
    command_line.keep_libraries_quiet()
    from fleet.run.build import export

    export.require_loadable(trained)
    export.write_export(trained, folder, options)
    if options.push_to_hub is not None:
        export.push(folder, options.push_to_hub, is_private=options.private)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
