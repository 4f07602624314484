"""Converts this server's types to vLLM's, and back."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mtlora.vllm_plugin.naming import ACTIVATION_KEY, LEASE_KEY
from server.errors import EngineAbortedError
from server.job import (
    Delta,
    FinishReason,
    GenerationJob,
    MoreSampling,
    Sampling,
    SoftTokens,
    TokenLogprob,
    TokenLogprobs,
)

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}


def sampling_params(sampling: Sampling, delta_tokens: int, extra: Mapping[str, Any] | None = None) -> Any:
    """vLLM's SamplingParams for output in pieces of `delta_tokens` tokens; a shorter answer comes in one piece.

    A typed answer that comes in one piece is not detokenized token by token; `delta` decodes it at once. This needs no
    search for stop strings, because a constraint excludes them unless `stops_occur`.

    extra: the result of `extra_args` for the job.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    in_one_piece = sampling.max_new_tokens <= delta_tokens
    # Detokenize if log-probabilities are requested: they include their tokens' texts.
    plain = not sampling.logprobs and sampling.more is None and not sampling.stops_occur
    tokens_alone = in_one_piece and sampling.constraint is not None and plain
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop=[] if tokens_alone else list(sampling.stop),
        detokenize=not tokens_alone,
        logprobs=sampling.logprobs or (0 if sampling.more and sampling.more.cumulative_logprob else None),
        structured_outputs=_structured_outputs(sampling.constraint) if sampling.constraint else None,
        output_kind=RequestOutputKind.FINAL_ONLY if in_one_piece else RequestOutputKind.DELTA,
        stream_interval=delta_tokens,
        extra_args=extra,
        # Skip vLLM's copy, because no other code uses this object.
        skip_clone=True,
        **(_more(sampling.more) if sampling.more else {}),
    )


def soft_prompt(prompt_ids: Sequence[int], soft: SoftTokens, cache_salt: str | None) -> Any:
    """vLLM's prompt of tokens and an image's soft tokens."""
    import torch

    from mtlora.vllm_plugin import requests

    return requests.soft_prompt(prompt_ids, soft.at, torch.from_numpy(soft.rows_SD), cache_salt)


def extra_args(job: GenerationJob) -> dict[str, Any] | None:
    """The plugin's arguments for a job with an activated adapter; None for other jobs."""
    if job.activation is None:
        return None
    return {ACTIVATION_KEY: job.activation} | ({LEASE_KEY: list(job.lease)} if job.lease else {})


@lru_cache(maxsize=1024)
def _structured_outputs(constraint: str) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(grammar=constraint)


def _more(more: MoreSampling) -> dict[str, Any]:
    return {
        "min_p": more.min_p,
        "presence_penalty": more.presence_penalty,
        "frequency_penalty": more.frequency_penalty,
        "repetition_penalty": more.repetition_penalty,
        # A bias of minus infinity gives a token probability zero, whatever else changes its logit.
        "logit_bias": {**more.logit_bias, **dict.fromkeys(more.banned_tokens, -math.inf)} or None,
        "allowed_token_ids": list(more.allowed_tokens) or None,
        "stop_token_ids": list(more.stop_token_ids),
        "min_tokens": more.min_new_tokens,
        "prompt_logprobs": more.prompt_logprobs or None,
    }


def delta(output: Any, sampling: Sampling, text_of: Callable[[Sequence[int]], str] | None) -> Delta:
    """A Delta of vLLM's RequestOutput. Raises EngineAbortedError if the engine ended the sequence by itself.

    text_of: decodes tokens; None if vLLM did.
    """
    completion = output.outputs[0]
    reason = completion.finish_reason
    if reason is not None and reason not in _FINISH_REASONS:
        raise EngineAbortedError(reason)
    times, text = output.metrics, completion.text
    if text_of is not None:
        # Like vLLM, omit the token that ended the answer.
        text = text_of(completion.token_ids[:-1] if reason == "stop" else completion.token_ids)
    return Delta(
        text=text,
        tokens=len(completion.token_ids),
        logprobs=_logprobs(completion.token_ids, completion.logprobs, sampling.logprobs),
        finish_reason=_FINISH_REASONS[reason] if reason else None,
        scheduled_at=(times.scheduled_ts or None) if times else None,
        first_token_at=(times.first_token_ts or None) if times else None,
        cached_tokens=output.num_cached_tokens or 0,
        token_ids=completion.token_ids,
        # A prompt's first token has no log-probabilities.
        prompt_logprobs=_logprobs(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], sampling.more.prompt_logprobs
        )
        if sampling.more and output.prompt_logprobs
        else (),
        cumulative_logprob=completion.cumulative_logprob,
    )


def _logprobs(
    token_ids: Sequence[int], positions: Sequence[dict[int, Any]] | None, most: int
) -> tuple[TokenLogprobs, ...]:
    if not positions or not most:
        return ()
    return tuple(_token_logprobs(*each, most) for each in zip(token_ids, positions, strict=True))


def _token_logprobs(token_id: int, position: dict[int, Any], most: int) -> TokenLogprobs:
    tokens = {
        each: TokenLogprob(each, entry.decoded_token or "", float(entry.logprob)) for each, entry in position.items()
    }
    # vLLM also lists the chosen token, whatever its rank.
    ranked = sorted((entry.rank, each) for each, entry in position.items())
    return TokenLogprobs(tokens[token_id], tuple(tokens[each] for _, each in ranked[:most]))
