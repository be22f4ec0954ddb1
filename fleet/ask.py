"""One answer of a model: shows it pictures, prints the call that it makes and, if it picks one, the picture.

    python -m fleet.ask --model_id runs/look/final --images toy_images --instruction "Pick the red circle."

For a model that a run left, the tools, the prompt and the sampling are the run's. Importing this file starts nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from environment import Environment, PickImageTask
from fleet.command import command_line
from fleet.command.evaluate_options import (
    EvaluateOptions,
    parse_evaluate_options,
    resolve_evaluate_options,
    run_options,
)
from fleet.command.flags import AT_LEAST_0, TOY_MODEL_ID, ModelFlags
from fleet.command.options import refuse_numbers
from fleet.command.parser import as_arguments, flag, make_parser, parse_flags, replace_default
from fleet.command.preflight import make_environment, require_model
from fleet.errors import UsageError, refused
from utils.images import BadImage, list_labelled_images
from utils.plain_text import printable, printable_lines
from utils.tool_calls import parse_call_str

MAX_IMAGES = 32
# flags of evaluate.py too; those that are not given are the run's
SHARED = ("model_id", "revision", "image_max_pixels", "max_completion_length", "allow_reasoning")


@dataclass(frozen=True)
class Question:
    """Pictures, by their index, the sentence that asks, and the task whose tools answer."""

    images: tuple[Path, ...]
    instruction: str
    task: Environment


def main(argv: Sequence[str] | None = None) -> None:
    """Asks once and prints the answer. Raises UsageError, before any weight loads, for a bad question."""
    command_line.set_up_logging()
    options, question, temperature = parse_question(sys.argv[1:] if argv is None else argv)
    command_line.keep_libraries_quiet()
    from fleet.run import model_setup
    from model_utils import generate_tool_call

    options, _ = resolve_evaluate_options(options, has_bf16_gpu=model_setup.has_bfloat16())
    model_setup.require_loadable_models(options.model_id, revision=options.revision)
    model_setup.say_what_the_toy_has_not_seen(options.model_id, options, question.images)
    model, processor = model_setup.load_policy(options, options)
    messages = question.task.messages_about(len(question.images), question.instruction)
    with refused(BadImage):
        text = generate_tool_call(
            model,
            processor,
            messages,
            question.images,
            max_completion_length=int(options.max_completion_length or 0),
            temperature=temperature,
            max_pixels=options.image_max_pixels,
        )
    print("\n".join(f"{index}: {printable(path)}" for index, path in enumerate(question.images)))
    picked = describe_answer(question, text)
    print(f"{printable(question.instruction)}\n{printable_lines(text)}\n{picked}")


# fmt: off
@dataclass(frozen=True)
class AskFlags:
    """A question to a model."""

    model_id: str = flag(TOY_MODEL_ID, "hub id or folder, as for training.py", metavar="ID")
    revision: str | None = replace_default(ModelFlags, "revision", None)
    images: tuple[str, ...] | None = flag(None, f"a folder of pictures, or up to {MAX_IMAGES} files", "required",
        metavar="PATH", parse=str, takes_several=True)
    instruction: str | None = flag(None, "the sentence that asks",
        "the run's, where one index was always right", metavar="TEXT")
    temperature: float = flag(0.0, "of sampling; 0 takes the likeliest", bounds=(AT_LEAST_0,))
    image_max_pixels: int | None = flag(None, "width times height an image is shrunk to, in pixels",
        "the run's, else as training.py")
    max_completion_length: int | None = flag(None, "tokens that the answer may have", "the run's, else as training.py")
    allow_reasoning: bool = flag(False, "ask for text before the call, and accept it; so does the run's own")
    # fmt: on


def build_ask_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    description = "Show pictures to a model, and print the call that it makes."
    return make_parser("python -m fleet.ask", description, {"question": (AskFlags,)}, AskFlags)


def parse_question(argv: Sequence[str]) -> tuple[EvaluateOptions, Question, float]:
    """(model and prompt, question, temperature) of a command line; at 0 the answer is greedy. Raises UsageError."""
    given = parse_flags(build_ask_parser(), argv)
    asked = AskFlags(**given)
    refuse_numbers(asked)
    forwarded = as_arguments({name: given[name] for name in SHARED if name in given})
    if asked.model_id == TOY_MODEL_ID and asked.instruction is not None:
        forwarded.append("--fixed_correct_index=none")
    options = parse_evaluate_options(forwarded)
    require_model(options.model_id)
    task: Environment = PickImageTask()
    if options.env is not None:
        task = cast(Environment, make_environment(options, options.eval_seed))
    task.allow_reasoning = options.allow_reasoning
    images, instruction = _pictures(asked.images, at_least=1 if options.env else 2), asked.instruction
    if instruction is None:
        run = run_options(options.model_id)
        if options.model_id != TOY_MODEL_ID and (run.get("env") or run.get("fixed_correct_index") is None):
            raise UsageError(
                f"instruction is missing: model_id={options.model_id} goes by what it names; pass --instruction, such "
                "as 'Pick the red circle.'"
            )
        instruction = "Pick the correct image."
    return options, Question(images, instruction, task), asked.temperature


def describe_answer(question: Question, text: str) -> str:
    """The line that says what an answer calls or picks, or why it is no call."""
    task, num_images = question.task, len(question.images)
    parsed = parse_call_str(text, task.tools, allow_reasoning=task.allow_reasoning)
    if parsed.call is None:
        return f"picked nothing: {parsed.status}" if isinstance(task, PickImageTask) else f"no call: {parsed.status}"
    if not isinstance(task, PickImageTask):
        return f"called {parsed.call.name}: {printable(parsed.call)}"
    index = parsed.call.arguments["index"]
    if not 0 <= index < num_images:
        return f"picked {index}, but there are {num_images} pictures"
    return f"picked {index}: {question.images[index]}"


def _pictures(named: Sequence[str] | None, at_least: int) -> tuple[Path, ...]:
    """The files that --images names, or those of its folder."""
    if not named:
        raise UsageError("images is missing; pass --images with a folder of pictures, or with files")
    paths = [Path(name).expanduser() for name in named]
    if missing := [path for path in paths if not path.exists()]:
        raise UsageError(f"images: {missing[0]} does not exist; correct --images")
    if len(paths) == 1 and paths[0].is_dir():
        with refused(ValueError, OSError, before="images: "):
            paths = [image.path for image in list_labelled_images(paths[0])]
    elif folders := [path for path in paths if path.is_dir()]:
        raise UsageError(f"images: {folders[0]} is a folder beside other paths; pass one folder, or files alone")
    if not at_least <= len(paths) <= MAX_IMAGES:
        raise UsageError(
            f"images: got {len(paths)} from {' '.join(named[:3])}, but one prompt shows all of them, from "
            f"{at_least} to {MAX_IMAGES}; pass fewer files, or another folder"
        )
    return tuple(paths)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
