"""What a checkpoint asks of generation, in the words of its generation_config.json: applied, or refused."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.inference.rules import Rules
from jaxllm.inference.sampling import Sampler

# Values with which a word changes nothing; with others it is refused, because nothing here computes it.
NEUTRAL: Mapping[str, Any] = {
    "begin_suppress_tokens": None, "constraints": None, "diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "exponential_decay_length_penalty": None, "force_words_ids": None,
    "guidance_scale": 1.0, "max_time": None, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": None,
    "sequence_bias": None, "stop_strings": None, "suppress_tokens": None, "token_healing": False,
    "watermarking_config": None,
}  # fmt: skip
NEUTRAL_DRAW: Mapping[str, Any] = {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "typical_p": 1.0, "top_h": None}
DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}  # what do_sample means where nothing is said
ELSEWHERE = """
_from_model_config assistant_confidence_threshold assistant_early_exit assistant_lookbehind bos_token_id cache_config
cache_implementation compile_config continuous_batching_config decoder_start_token_id disable_compile do_sample
dola_layers eos_token_id force_bos_token_to_be_generated forced_bos_token_id is_assistant low_memory max_cache_len
max_length max_matching_ngram_size min_length num_assistant_tokens num_assistant_tokens_schedule output_attentions
output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens
remove_invalid_values repetition_penalty return_dict_in_generate target_lookbehind transformers_version use_cache
"""  # read by other names, or words on how, not what, is computed


class Search(Config):
    """How wide a target is searched, and what it may not say. Lengths count the tokens behind the start token."""

    num_beams: int = Field(1, ge=1, description="targets that are followed at a time; 1 = no search")
    length_penalty: float = Field(1.0, description="a target's score is log p / length ** this; > 0 favours long ones")
    early_stopping: bool | Literal["never"] = Field(
        False, description="end with num_beams whole targets (true), if none of the others is better as it is now "
        "(false), or if none could be with the longest length (never)",
    )  # fmt: skip
    no_repeat_ngram_size: int = Field(0, ge=0, description="a run of so many tokens never occurs twice; 0 = it may")
    bad_words_ids: tuple[tuple[int, ...], ...] = Field((), description="sequences of tokens that never occur")
    min_new_tokens: int = Field(0, ge=0, description="shortest target, without its end")
    max_new_tokens: int | None = Field(None, ge=1, description="longest target")
    forced_eos_token_id: tuple[int, ...] = Field((), description="the last token of a target that reaches its limit")
    renormalize_logits: bool = Field(False, description="beams count probabilities of allowed tokens alone")

    @classmethod
    def read(cls, asked: Mapping[str, Any]) -> tuple[Self, Sampler]:
        """Return what a generation_config.json asks for; a word that is None is not there.

        Raises:
          ValueError: a word that is not known, or that nothing here computes; all of them.
        """
        asked = {word: value for word, value in asked.items() if value is not None}
        draws = asked.get("do_sample", False)
        neutral = NEUTRAL | NEUTRAL_DRAW if draws else NEUTRAL
        changes = lambda word, value: word not in WORDS or value != neutral.get(word, value)
        refused = {word: value for word, value in asked.items() if changes(word, value)}
        if draws and asked.get("num_beams", 1) > 1:
            refused |= {"do_sample": True, "num_beams": asked["num_beams"]}
        if refused:
            words = ", ".join(f"{word}={value!r}" for word, value in sorted(refused.items()))
            raise ValueError(
                f"generation_config.json asks for {words}, which is not computed here; take it out, or set search and "
                "sampler of the model in Python"
            )
        found = {word: asked[word] for word in cls.model_fields if word in asked}
        for word in ("min", "max"):
            if f"{word}_length" in asked:
                found.setdefault(f"{word}_new_tokens", max(asked[f"{word}_length"] - 1, 0))
        ends = found.get("forced_eos_token_id", ())
        found["forced_eos_token_id"] = (ends,) if isinstance(ends, int) else ends
        drawn = {word: asked.get(word, default) for word, default in DRAWN.items()} if draws else {"temperature": 0.0}
        if drawn.get("top_k") == 0:  # transformers' word for all
            drawn["top_k"] = None
        return cls(**found), Sampler(repetition_penalty=asked.get("repetition_penalty", 1.0), **drawn)

    def rules(self, stop_ids: Sequence[int], begun: int = 0) -> Rules:
        """Return what of it is decided token by token.

        Args:
          stop_ids: a word that is one of these alone is none. begun: tokens that every target has already.
        """
        whole = lambda number: np.int32(number) if number > 0 else None
        words = [word for word in self.bad_words_ids if word not in {(token,) for token in stop_ids}]
        width = max(map(len, words), default=0)
        rows = np.asarray([[-1] * (width - len(word)) + list(word) for word in words], np.int32)
        ends = np.asarray(self.forced_eos_token_id, np.int32)
        shortest = whole(self.min_new_tokens - begun)
        return Rules(whole(self.no_repeat_ngram_size), rows if words else None, shortest, ends if len(ends) else None)


WORDS = frozenset({*Search.model_fields, *NEUTRAL, *NEUTRAL_DRAW, *DRAWN, *ELSEWHERE.split()})  # all that are known
