"""What people and models wrote is shown as text: in tables, in the log and in errors, without a torch."""

import logging
from collections.abc import Callable

import pytest

from fleet.command import command_line
from fleet.command.options import ResolvedDefault
from fleet.errors import RunStopped, UsageError
from fleet.rl.rollouts import RolloutRecord
from fleet.run.records import resolved_table, sample_table
from tests.helpers_env import judged_verdict, pick_record

pytestmark = pytest.mark.fast

HOSTILE = ["two [/INST]", "[bold]red[/bold]", "[red", "\\[x]", "[link=file:///]x[/link]", ":smile: [/]", "红 🔴 é"]
UNPRINTED = {
    "\x1b[31mred": r"\x1b[31mred",
    "a\rb": r"a\rb",
    "a\x00b": r"a\x00b",
    "a\u202eb": r"a\u202eb",
    "\x9b2J": r"\x9b2J",
}


def table_of(target: str, completion: str) -> str:
    episode = pick_record(2, (target,) * 4, target, f"Pick the {target}.")
    return sample_table([RolloutRecord(episode, completion, judged_verdict(completion, 2, 4), 0.0, -0.5)], step=7)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_sample_table_takes_no_text_for_markup(text: str) -> None:
    table = table_of(text, f"I say {text}")
    assert f"2 ({text})" in table and f"I say {text}" in table and "unparsable: no_call" in table


@pytest.mark.parametrize(("text", "shown"), UNPRINTED.items())
def test_the_sample_table_spells_out_what_does_not_print(text: str, shown: str) -> None:
    table = table_of(text, f"I say {text}\n")
    assert f"2 ({shown})" in table and rf"I say {shown}\n" in table and text not in table


def test_the_table_of_defaults_takes_no_value_for_markup() -> None:
    assert "runs/[/INST]" in resolved_table([ResolvedDefault("output_dir", "runs/[/INST]", "a new folder")])


def refusing(error: Exception) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("kind", [UsageError, RunStopped, KeyError])
@pytest.mark.parametrize(("text", "shown"), UNPRINTED.items())
def test_an_error_spells_out_what_does_not_print(
    text: str, shown: str, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.run(refusing(kind(f"label {text} is wrong"))) in (1, 2)
    said = capsys.readouterr().err
    assert text not in said
    # Python itself quotes the text of a KeyError
    assert said.splitlines()[-1].startswith("error: ") and shown in said.splitlines()[-1].replace("\\\\", "\\")


@pytest.mark.parametrize(("text", "shown"), UNPRINTED.items())
def test_the_log_spells_out_what_does_not_print_and_keeps_lines(text: str, shown: str) -> None:
    def formatted(is_coloured: bool) -> str:
        record = logging.LogRecord("fleet", logging.INFO, __file__, 1, f"model {text}\nnext", None, None)
        record.__dict__.update(command_line.COLOURED if is_coloured else {})
        return command_line.PlainFormatter("%(message)s").format(record)

    assert formatted(is_coloured=False) == f"model {shown}\nnext"
    assert formatted(is_coloured=True) == f"model {text}\nnext"


def test_the_commands_log_through_that_formatter(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.root.handlers[:]
    try:
        command_line.set_up_logging()
        logging.getLogger("fleet").info("red \x1b[31mcup")
    finally:
        logging.root.handlers[:] = before
    assert capsys.readouterr().err == "red \\x1b[31mcup\n"
