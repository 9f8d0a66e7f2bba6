"""mistral.rs in process: requests stream side by side, adapters chosen by request.

It takes no adapters on a llama GGUF file, whose rows of query and key are permuted, so with adapters it
quantises the checkpoint itself, to the same type. Nor does it take tokens: prompts go in as text of as many.
"""

import importlib.metadata
import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from driver import Job, serve

MAX_SEQS = 32
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MAX_FITS = 50


class MistralRs:
    def __init__(self, job: Job) -> None:
        os.environ |= {"RAYON_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}  # read at import
        import mistralrs  # noqa: PLC0415

        self._mistralrs, self._job = mistralrs, job
        self.engine = f"mistral.rs {importlib.metadata.version('mistralrs')}"
        dtype = DTYPES[job.precision.dtype]
        in_place = job.precision.gguf if job.precision.is_quantized and job.distinct else None
        self.settings: dict[str, object] = {
            "dtype": dtype,
            "max_seqs": MAX_SEQS,
            "in_situ_quant": in_place,
            "weights": job.precision.gguf,
        }
        which = self._which(getattr(mistralrs.ModelDType, dtype))
        template = job.work / "content.jinja"
        template.write_text(TEMPLATE)
        self._runner = mistralrs.Runner(
            which,
            max_seqs=MAX_SEQS,
            prefix_cache_n=0,
            in_situ_quant=in_place,
            jinja_explicit=str(template),
        )
        self._texts: dict[tuple[int, ...], str] = {}

    def batch(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        texts = [self._text(prompt) for prompt in prompts]
        answers = [
            self._stream(text, new_tokens, self._job.adapter_of(index)) for index, text in enumerate(texts)
        ]
        return [self._finish(answer, prompts[0])[1] for answer in answers]

    def stream(self, prompt: list[int], new_tokens: int) -> list[float]:
        """Chunks hold whole characters, so the tokens between the first and the last are spread evenly."""
        times, count = self._finish(self._stream(self._text(prompt), new_tokens, None), prompt)
        gap = (times[-1] - times[0]) / (count - 1)
        return [times[0] + gap * index for index in range(count)]

    def close(self) -> None:
        pass

    def _which(self, dtype: Any) -> Any:
        which, model = self._mistralrs.Which, str(self._job.data / "model")
        if self._job.distinct:
            folders = [self._job.data / f"adapters/adapter-{index}" for index in range(self._job.distinct)]
            adapters = [self._mistralrs.LoraAdapter(folder.name, str(folder)) for folder in folders]
            return which.Lora(model_id=model, adapters=adapters, dtype=dtype, max_adapters=self._job.distinct)
        if self._job.precision.is_quantized:
            file: Path = self._job.gguf
            return which.GGUF(str(file.parent), file.name, tok_model_id=model, dtype=dtype)
        return which.Plain(model_id=model, dtype=dtype)

    def _stream(self, text: str, new_tokens: int, adapter: int | None) -> Iterable[Any]:
        request = self._mistralrs.ChatCompletionRequest(
            messages=[{"role": "user", "content": text}],
            model="default",
            max_tokens=new_tokens,
            temperature=0.0,
            ignore_eos=True,
            stream=True,
            adapter=None if adapter is None else f"adapter-{adapter}",
        )
        chunks: Iterable[Any] = self._runner.send_chat_completion_request(request)
        return chunks

    def _finish(self, chunks: Iterable[Any], prompt: list[int]) -> tuple[list[float], int]:
        """When each chunk came, and how many tokens there were."""
        times, usage = list[float](), None
        for chunk in chunks:
            times.append(time.perf_counter())
            usage = chunk.usage or usage
        if usage is None or usage.prompt_tokens != len(prompt):
            raise RuntimeError(
                f"mistral.rs took {usage and usage.prompt_tokens} prompt tokens, not {len(prompt)}"
            )
        return times, usage.completion_tokens

    def _text(self, prompt: list[int]) -> str:
        key = tuple(prompt)
        if key not in self._texts:
            self._texts[key] = self._fit(prompt)
        return self._texts[key]

    def _fit(self, prompt: list[int]) -> str:
        """Text of as many tokens, about those of the prompt: bytes and spaces between tokens may join."""
        ids = list(prompt)
        for _ in range(MAX_FITS):
            text: str = self._runner.detokenize_text(ids, False)
            again = self._runner.tokenize_text(text, False, None)
            if len(again) == len(prompt):
                return text
            ids = again[: len(prompt)] + list(itertools.islice(prompt, max(0, len(prompt) - len(again))))
        raise RuntimeError(f"no text of {len(prompt)} tokens was found for a prompt")


if __name__ == "__main__":
    serve(MistralRs)
