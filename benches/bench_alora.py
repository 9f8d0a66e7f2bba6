"""What an adapter with an invocation (aLoRA) saves over a plain one: turns of base → adapter → base."""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from adapter_files import write_adapters
from loraserve import LLM, SamplingParams
from machine import describe
from tqdm import tqdm
from workloads import Request, prompts

INVOCATION = [1, 9690, 198]
TURN_TOKENS = 64  # a question
ANSWER_TOKENS = 32
ANSWER = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def main() -> None:
    """Prints, per length of conversation, prompt tokens computed and time to the adapter's first token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 2000, 6000], metavar="TOKENS")
    parser.add_argument("--turns", type=int, default=5, help="of base → adapter, each on what came before")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        paths = write_adapters(Path(directory), 2, options.rank)
        plain, alora = paths
        _give_invocation(Path(paths[alora]))
        with LLM("smollm2", paths, memory="2GiB") as llm:
            for length in tqdm(options.lengths, desc="conversations", leave=False):
                results.append(
                    {
                        "conversation_tokens": length,
                        "plain": measure(llm, plain, _text(length, seed=2 * length), options.turns),
                        "alora": measure(llm, alora, _text(length, seed=2 * length + 1), options.turns),
                    }
                )
    for result in results:
        print(line(result))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": describe(), "results": results}, indent=1))


def measure(llm: LLM, adapter: str, conversation: list[int], turns: int) -> dict[str, Any]:
    """Turns of a conversation: the base has answered, the adapter judges all of it, the base goes on."""
    llm.generate([_text(16, seed=1)], FIRST_TOKEN, adapter)  # it is resident
    times, computed = [], 0
    for turn in range(turns):
        llm.generate([conversation], FIRST_TOKEN)  # the base has seen it
        before, begin = _num_computed(llm, adapter), time.perf_counter()
        judged = [*conversation, *INVOCATION]
        llm.generate([judged], FIRST_TOKEN, adapter)
        times.append(time.perf_counter() - begin)
        computed += _num_computed(llm, adapter) - before
        answer = llm.generate([conversation], ANSWER)[0].token_ids
        conversation = [*conversation, *answer, *_text(TURN_TOKENS, seed=turn)]
    return {"prompt_tokens_computed": computed, "first_token_ms": statistics.median(times) * 1e3}


def line(result: dict[str, Any]) -> str:
    """A line of the table."""
    plain, alora = result["plain"], result["alora"]
    return (
        f"{result['conversation_tokens']:>6} tokens: adapter's prompt tokens computed "
        f"{plain['prompt_tokens_computed']} -> {alora['prompt_tokens_computed']}, first token "
        f"{plain['first_token_ms']:.0f} -> {alora['first_token_ms']:.0f} ms "
        f"({plain['first_token_ms'] / alora['first_token_ms']:.1f} x)"
    )


def _num_computed(llm: LLM, adapter: str) -> int:
    usage = llm.stats().adapters[adapter].usage
    return usage.num_prompt_tokens - usage.num_cached_tokens


def _text(num_tokens: int, seed: int) -> list[int]:
    (prompt,) = prompts([Request(0.0, 0, num_tokens, 1)], seed=seed)
    return prompt


def _give_invocation(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | {"alora_invocation_tokens": INVOCATION}
    file.write_text(json.dumps(config))


if __name__ == "__main__":
    main()
