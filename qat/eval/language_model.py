"""lm-eval's wrapper of a model: tokenizers as they are, shared prompts once, only the logits that are read, one bar.

Importing this imports lm-eval, which takes seconds.
"""

from __future__ import annotations

import copy
import functools

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qat.eval import prefixes
from qat.models.tokenizer import document_token


class LanguageModel(HFLM):
    """A Hugging Face model as lm-eval asks it questions, of at most `max_length` tokens each.

    share_prefixes: encode what sequences share once (`qat.eval.prefixes`), if the model can.

    truncated: pairs of context and choice that did not fit. longest: tokens of the longest choice.
    """

    truncated = frozenset()

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int,
        progress: bool = False,
        share_prefixes: bool = True,
    ):
        self._added, self._progress = _added_behind(tokenizer), progress
        self._share_prefixes = share_prefixes and prefixes.shareable(model)
        named = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
        own = copy.deepcopy(tokenizer)  # lm-eval gives it a pad token, for which it may need one more
        if own.pad_token_id is None and not named:
            own.pad_token_id = document_token(tokenizer)
        own.encode = functools.lru_cache(maxsize=2)(own.encode)  # the choices of a question share their prompt
        super().__init__(
            pretrained=model,
            tokenizer=own,
            prefix_token_id=None if named else document_token(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",  # BF16 log-probabilities of -100 lie 0.5 apart, and choices would tie
        )

    def tok_encode(self, string, add_special_tokens=None, **how):
        """Encode as lm-eval does, less what the tokenizer adds behind a text: no answer follows an end of text."""
        tokens = super().tok_encode(string, add_special_tokens, **how)
        end = len(tokens) - len(self._added)
        added = self._added and add_special_tokens is None and tokens[end:] == self._added
        return tokens[:end] if added else tokens

    def _encode_pair(self, context, continuation):
        """Encode as lm-eval does, prompt and answer together, but apart where a token would span both."""
        prompt, answer = super()._encode_pair(context, continuation)
        if not answer or prompt + answer != self.tok_encode(context + continuation):
            spaces = context[len(context.rstrip()) :]
            answer = self.tok_encode(spaces + continuation, add_special_tokens=False)
        return prompt, answer

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        self.longest = max(len(choice) for _, _, choice in requests)
        room = self.max_length + 1
        self.truncated |= {texts for texts, context, choice in requests if len(context) + len(choice) > room}
        if not self._share_prefixes:
            return super()._loglikelihood_tokens(requests, not self._progress, override_bs)
        pairs = [(context, choice) for _, context, choice in requests]
        scored = prefixes.log_likelihoods(self.model, pairs, self.max_length)
        bar = tqdm(scored, total=len(requests), desc="Running loglikelihood requests", disable=not self._progress)
        results = {place: (logprob, is_greedy) for place, logprob, is_greedy in bar}
        return [results[place] for place in range(len(requests))]

    def _model_call(self, inps, attn_mask=None, labels=None):
        """Return the logits of the choices' tokens only, which are all that lm-eval reads; it counts them from the end.

        Rows are padded with 0 on the right; where 0 is a token of the text, a few positions more are kept.
        """
        padding = int((inps.flip(1).cumsum(1) == 0).sum(1).max())
        with torch.no_grad():
            return self.model(inps, logits_to_keep=min(self.longest + padding, inps.shape[1])).logits


def _added_behind(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer adds behind a text, as an end of text."""
    text = "Question: 1 + 1?\nAnswer: 2"
    whole, bare = (tokenizer.encode(text, add_special_tokens=special) for special in (True, False))
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[next(starts, len(whole)) + len(bare) :]
