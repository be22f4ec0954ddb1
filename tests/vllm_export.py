"""Run by tests/export/test_vllm_loads.py: a real vLLM opens an exported folder as it stands and scores a prompt.

Arguments: FOLDER, RESULTS.json. Nothing is adapted to this CPU but the dtype, as weights are never sent again.
"""

import json
import sys
from pathlib import Path

from transformers import AutoProcessor

from tests.export.oracle import pictures_shown, text_of


def main(folder: str, results: Path) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, limit_mm_per_prompt={"image": 2})
    prompt = {"prompt": text_of(AutoProcessor.from_pretrained(folder)), "multi_modal_data": {"image": pictures_shown()}}
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    results.write_text(json.dumps([found[token].logprob for token, found in scored]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
