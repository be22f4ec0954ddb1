"""A hub model's type, asked before anything large is fetched. Imports no torch."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from fleet.errors import UsageError, one_line
from fleet.model_folder.files import read_json
from fleet.run_folder import CONFIG_NAME

logger = logging.getLogger("fleet")

TIMEOUT_S = 10.0


def require_qwen_on_hub(model_id: str, revision: str | None = None, *, endpoint: str | None = None) -> None:
    """Raises UsageError if the hub says that it has no such model, or that the model is no Qwen2.5-VL.

    Reads the hub's cache, else asks the hub (endpoint) once, for up to TIMEOUT_S. Logs a line if neither answers.
    """
    try:
        cached = try_to_load_from_cache(model_id, CONFIG_NAME, revision=revision)
        model_type = read_json(Path(cached)).get("model_type") if isinstance(cached, str) else None
        if model_type is None:
            found = HfApi(endpoint).model_info(model_id, revision=revision, timeout=TIMEOUT_S)
            model_type = (found.config or {}).get("model_type")
        unknown = "the hub does not name its type"
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UsageError(
            f"model_id={model_id}: the hub shows you no such model{at}; correct --model_id or --revision, or run hf "
            "auth login if it is private"
        ) from error
    except UsageError:
        raise
    # no answer may stop a run, and a broken connection raises errors of whatever HTTP library huggingface_hub uses
    except Exception as error:
        model_type, unknown = None, one_line(error)[:200] or type(error).__name__
    if model_type is None:
        logger.info(
            f"{model_id} could not be asked whether it is a Qwen2.5-VL ({unknown}); it is checked as it loads\n"
        )
    elif model_type != "qwen2_5_vl":
        raise UsageError(
            f"model {model_id} on the hub is a {model_type}, but Fleet trains qwen2_5_vl; pass a Qwen2.5-VL such as "
            "Qwen/Qwen2.5-VL-3B-Instruct"
        )
