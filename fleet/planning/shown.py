"""A prediction as it is shown: a table for --dry_run, a line at every start, figures for JSON."""

from typing import Any

from rich.table import Table

from fleet.planning.machine import GIB
from fleet.planning.plan import Prediction
from fleet.planning.problems import as_gib
from fleet.planning.work import REACHED_SHARE


def figures_of(found: Prediction) -> dict[str, Any]:
    """The figures of a prediction by their names in --json and config.json; memory in GiB, per process."""
    memory, lengths = found.memory, found.lengths
    least, mean, most = lengths.image_tokens
    return {
        "parameters": {
            name: {"total": part.total, "trainable": part.trainable} for name, part in found.counts.size.parts.items()
        },
        "image_tokens": {"least": least, "mean": round(mean, 1), "most": most},
        "prompt_tokens": {"mean": round(lengths.prompt, 1), "most": lengths.longest_prompt},
        "step_tokens": {"tree": step_tokens(found), "trl": step_tokens(found, of_trl=True)},
        "memory_gpu_gib": as_gib({**memory.parts, "total": memory.total}),
        "memory_phases_gib": as_gib(memory.phases),
        "memory_host_gib": round(memory.host_total / GIB, 3),
        "gradient_checkpointing": found.is_checkpointed,
        "largest_batch": found.largest_batch,
        "checkpoint_gib": round(found.checkpoint_bytes / GIB, 3),
        "step_tflop": round(found.step_flops / 1e12, 4),
        "step_s": None if found.step_s is None else [round(seconds, 3) for seconds in found.step_s],
    }


def step_tokens(found: Prediction, *, of_trl: bool = False) -> int:
    """Tokens that pass through one device's training passes of an optimizer step, at most."""
    work = found.work
    tokens = work.packed_tokens if found.is_packed and not of_trl else work.unpacked_tokens
    return tokens * found.options.gradient_accumulation_steps


def table_of(found: Prediction) -> Table:
    """The prediction as a table for the terminal."""
    table = Table(title="what this run needs", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("what", "how much", ""):
        table.add_column(heading, justify="right" if heading == "how much" else "left")
    for rows in (_model_rows(found), _token_rows(found), _memory_rows(found), _other_rows(found)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _model_rows(found: Prediction) -> list[tuple[str, str, str]]:
    return [
        (name, f"{part.total:,}", "trains" if part.trainable == part.total else _trained(part.trainable))
        for name, part in found.counts.size.parts.items()
    ]


def _trained(count: int) -> str:
    return f"of which {count:,} train" if count else "frozen"


def _token_rows(found: Prediction) -> list[tuple[str, str, str]]:
    lengths, options = found.lengths, found.options
    least, mean, most = lengths.image_tokens
    context = found.config.get_text_config().max_position_embeddings
    about = ", counted without the model's tokenizer" if lengths.is_estimate else ""
    way = "on the trees of tokens" if found.is_packed else "in TRL's rows"
    return [
        ("tokens of a picture", f"{mean:,.0f}", f"{least:,} to {most:,}, at {options.image_max_pixels:,} pixels"),
        ("tokens of a prompt", f"{lengths.prompt:,.0f}", f"at most {lengths.longest_prompt:,}{about}"),
        ("tokens of a completion", f"{options.max_completion_length:,}", f"at most; the context has {context:,}"),
        ("tokens a step", f"{step_tokens(found):,}", f"at most, a process, {way}; {step_tokens(found, of_trl=True):,} "
         "in TRL's own"),
    ]  # fmt: skip


def _memory_rows(found: Prediction) -> list[tuple[str, str, str]]:
    memory, machine = found.memory, found.machine
    where = "GPU" if machine.has_gpu else "process"
    rows = [(f"memory of {name}", _size(num_bytes), "") for name, num_bytes in memory.parts.items() if num_bytes]
    rows.append(
        (
            f"memory of a {where}",
            _size(memory.total),
            f"in its {memory.largest_phase}; {_size(found.limit)} can be used",
        )
    )
    if machine.has_gpu:
        parts = ", ".join(f"{_size(num_bytes)} {name}" for name, num_bytes in memory.host.items() if num_bytes)
        there = "" if machine.host_bytes is None else f"; there is {_size(machine.host_bytes)}"
        rows.append(("memory of a host", _size(memory.host_total), f"{parts}{there}"))
    return rows


def _other_rows(found: Prediction) -> list[tuple[str, str, str]]:
    options = found.options
    disk = "" if found.free_disk is None else f", {_size(found.free_disk)} free"
    rows = [
        ("gradient checkpointing", "on" if found.is_checkpointed else "off", "activations are computed again, or kept"),
        ("largest batch", f"{found.largest_batch:,}", "episodes, for --per_device_batch_size"),
        ("a checkpoint", _size(found.checkpoint_bytes), f"on disk, {options.save_total_limit} kept{disk}"),
        ("a step", f"{found.step_flops / 1e12:,.2f} TFLOP", f"on each of {found.launch.num_processes}"),
    ]
    if found.step_s is not None:
        least, likely = found.step_s
        name = found.machine.gpu_name
        rows.append(("", f"{likely:,.2f} s", f"at {REACHED_SHARE:.0%} of a {name}'s rate; {least:,.2f} s at all of it"))
    return rows


def _size(num_bytes: int) -> str:
    """Bytes in MiB or GiB.

    >>> _size(3 * 2**20), _size(3 * 2**30)
    ('3 MiB', '3.0 GiB')
    """
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes < GIB else f"{num_bytes / GIB:,.1f} GiB"


def line_of(found: Prediction) -> str:
    """The prediction in a line, for the start of a run."""
    where = "of a GPU" if found.machine.has_gpu else "of memory"
    return (
        f"predicted: {_size(found.memory.total)} {where}, of {_size(found.machine.device_bytes)} (most in its "
        f"{found.memory.largest_phase}, gradient checkpointing {'on' if found.is_checkpointed else 'off'}); at most "
        f"{step_tokens(found):,} tokens and {found.step_flops / 1e12:,.2f} TFLOP a step; a checkpoint of "
        f"{_size(found.checkpoint_bytes)}\n"
    )
