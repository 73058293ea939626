"""Which words of a prompt, and which places of an image, carry the memory.

*Words.* What is attributed is the free half of the default detector, `added_detail` of the observed steps, and not to
positions of the prompt embedding: the text encoder mixes all words into the later ones, and on the first reference the
padding holds most of a memory. Gradients go through the text encoder to the token embeddings that it is given, and
words are ablated in the text. *Places* come from the local LID.

How often the first of all words is one of a memorized caption's two rare ones, and how well the map tells pinned places
from free ones, by method and step: `benchmarks/attribution.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from sd_guard.lanes import call_unet
from sd_guard.noise import at_least_float32, interpret
from sd_guard.statistics.base import Denoiser, Lane, StepCall
from sd_guard.statistics.sharpness import added_detail
from sd_guard.trace import FiniteDifference, draw_row_probes

Method: TypeAlias = Literal["ablation", "gradient_norm", "integrated_gradients"]
EmbedsFunction: TypeAlias = Callable[[Tensor], Tensor]

_ROWS: Final = 8  # evaluated at once, forwards or backwards: it bounds the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class WordAttribution:
    """What each word does to the deciding statistic.

    Attributes:
        words: as of `prompt.split()`.
        scores: one a word. The positive ones, of words that raise the statistic, sum to 1; all are 0 where none does.
            A word beyond the text encoder's last token has 0.
        method: that gave them.
    """

    words: tuple[str, ...]
    scores: tuple[float, ...]
    method: Method


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptText:
    """A prompt on its way from words to the embedding that the UNet is given.

    Attributes:
        words: as of `prompt.split()`, at least one.
        word_of_token: (T) the word that a token belongs to; None for special and padding tokens.
        tokens: (1, T, width) token embeddings, which the text encoder starts from, in float32 or better.
        empty_tokens: (1, T, width) those of the empty prompt.
        encode: (N, T, width) token embeddings to (N, T, width') prompt embeddings, differentiable.
        encode_prompts: N prompts to (N, T, width') prompt embeddings.
    """

    words: tuple[str, ...]
    word_of_token: tuple[int | None, ...]
    tokens: Tensor
    empty_tokens: Tensor
    encode: EmbedsFunction
    encode_prompts: Callable[[Sequence[str]], Tensor]


def read_text(pipe: Any, prompt: str) -> PromptText:
    """Reads a prompt as a pipeline does.

    While token embeddings are looked at or replaced, the text encoder has a hook: no other thread may use it then.
    Textual inversions of several vectors, which the pipeline would write into the prompt, are not understood.

    Raises:
        ValueError: a prompt without words, or one whose tokens cannot be told apart.
    """

    def encode_prompts(prompts: Sequence[str]) -> Tensor:
        return pipe.encode_prompt(list(prompts), pipe._execution_device, 1, False)[0]

    def token_embeddings(text: str) -> Tensor:
        seen: list[Tensor] = []
        with torch.no_grad(), _hooked(pipe, seen.append):
            encode_prompts([text])
        return at_least_float32(seen[-1])

    def encode(tokens: Tensor) -> Tensor:
        with _hooked(pipe, tokens.to):
            return encode_prompts([prompt] * len(tokens))

    tokens = token_embeddings(prompt)
    word_of_token = words_of_tokens(pipe.tokenizer, prompt, tokens.shape[1])
    if all(word is None for word in word_of_token):
        raise ValueError(f"prompt {prompt!r} has no words: give one to explain")
    return PromptText(
        words=tuple(prompt.split()),
        word_of_token=word_of_token,
        tokens=tokens,
        empty_tokens=token_embeddings(""),
        encode=encode,
        encode_prompts=encode_prompts,
    )


def words_of_tokens(tokenizer: Any, prompt: str, tokens: int) -> tuple[int | None, ...]:
    """The word, an index into `prompt.split()`, of each of the `tokens` tokens that a prompt is padded or cut to.

    None for special and padding tokens. CLIP's tokenizers, fast or slow, merge nothing across white space: the words
    are read one by one.

    Raises:
        ValueError: words that read otherwise on their own, such as those that only a control character sets apart.
    """
    words, special = prompt.split(), {tokenizer.bos_token_id, tokenizer.eos_token_id}
    read = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    pieces = [(token, word) for word, ids in enumerate(read) for token in ids][: tokens - 2]
    whole = tokenizer(prompt, truncation=True, max_length=tokens).input_ids
    if whole[1:-1] != [token for token, _ in pieces]:
        raise ValueError("prompt: its words have other tokens on their own; separate them by spaces")
    owners = [None if token in special else word for token, word in pieces]
    return (None, *owners, *[None] * (tokens - 1 - len(owners)))


def statistic_of(call: StepCall, model: Denoiser) -> EmbedsFunction:
    """The deciding statistic of one step as a function of the text, differentiable in reverse mode.

    Latent, noise level and control stay those of `call`, which has one image. In float16 small gradients may vanish.

    Returns:
        (N, T, width) prompt embeddings to (N,) `added_detail`, float32.

    Raises:
        ValueError: several images, or no control.
    """
    if len(call.x) != 1:
        raise ValueError(f"call holds {len(call.x)} images: explain them one by one")
    control = model.read(call, "control").x0_hat

    def statistic(embeds: Tensor) -> Tensor:
        rows = torch.ones(len(embeds), dtype=torch.int64, device=call.x.device)  # the second lane is the prompt's
        lanes = call.lanes.select(rows).with_prompt(embeds.to(call.lanes.prompt_embeds))
        x = call.x.expand(len(embeds), *call.x.shape[1:])
        output = call_unet(model.unet, x, call.timestep, lanes)
        x0_hat = interpret(output, x, call.level, model.prediction_type).x0_hat
        return added_detail(x0_hat, control.expand_as(x0_hat))

    return statistic


def gradient_norm(calls: Sequence[StepCall], model: Denoiser, text: PromptText) -> WordAttribution:
    """Norm of the statistic's gradient with respect to a word's token embeddings, mean over the steps.

    After the significance score of Wen et al. (2024, ICLR, arXiv 2407.21720): the mean over steps of
    ``|grad_{e_i} |e_c - e_u||``, which Ross et al. (2024, arXiv 2411.00113) take of FLIPD, too. In both authors' code
    e_i is a position of the text encoder's *output*; here it is its input (see the module), and the statistic is the
    deciding one. The norm is over all tokens of a word together. `calls` are the observed steps of one image, each with
    a control, and `text` is the prompt that they were sampled with.

    Raises:
        ValueError: as of `statistic_of`, no calls, or answers that are not finite.
    """

    def scores(statistic: EmbedsFunction) -> Tensor:
        with torch.enable_grad():
            tokens = text.tokens.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(statistic(text.encode(tokens)).sum(), tokens)
        return _by_word(text, gradient[0].square().sum(-1)).sqrt()

    return _mean_over_steps(calls, model, text, scores, "gradient_norm")


def integrated_gradients(
    calls: Sequence[StepCall], model: Denoiser, text: PromptText, *, points: int = 64
) -> WordAttribution:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365), by captum, mean over the steps.

    Along the straight line from the token embeddings of the empty prompt, so that, before they are normalised, the
    scores sum to the statistic's rise over the empty prompt (with 64 points to within 3 % on the rows above). `points`
    are of a Gauss-Legendre rule, each a forward and a backward evaluation a step.

    Raises:
        ImportError: captum is not installed.
        ValueError: as of `gradient_norm`.
    """
    attr = _captum("integrated_gradients")

    def scores(statistic: EmbedsFunction) -> Tensor:
        integrated = attr.IntegratedGradients(lambda tokens: statistic(text.encode(tokens)))
        found: Tensor = integrated.attribute(text.tokens, text.empty_tokens, n_steps=points, internal_batch_size=_ROWS)
        return _by_word(text, found[0].sum(-1))

    return _mean_over_steps(calls, model, text, scores, "integrated_gradients")


def ablation(calls: Sequence[StepCall], model: Denoiser, text: PromptText, *, run: int = 2) -> WordAttribution:
    """How far the statistic falls without a word and its neighbours, by captum's `FeatureAblation`, mean over steps.

    Each run of `run` words, fewer where that would be all, is left out of the text in turn: of two names that each
    carry the memory, leaving out one alone would miss both. A word's score is the mean fall of the runs that it is in.
    Costs a lane a run and step, and up to `2 run` a step.

    Raises:
        ImportError: captum is not installed.
        ValueError: as of `gradient_norm`, or `run` below 1.
    """
    if run < 1:
        raise ValueError(f"run={run} leaves out nothing: give at least 1")
    attr = _captum("ablation")
    # Words that were cut off stay out, or one of them would come in for each that is left out.
    seen = sorted({word for word in text.word_of_token if word is not None})
    width = max(1, min(run, len(seen) - 1))

    def scores(statistic: EmbedsFunction) -> Tensor:
        def of_kept(kept: Tensor) -> Tensor:
            rows = [[text.words[k] for k, keep in zip(seen, row, strict=True) if keep] for row in kept.tolist()]
            return statistic(text.encode_prompts([" ".join(row) for row in rows]))

        ablate, all_kept = attr.FeatureAblation(of_kept), torch.ones(1, len(seen), device=text.tokens.device)
        places = torch.arange(len(seen), device=all_kept.device)[None]
        tilings = [(places + shift) // width for shift in range(width)]  # every run is in one of them
        falls = [ablate.attribute(all_kept, feature_mask=runs, perturbations_per_eval=_ROWS)[0] for runs in tilings]
        whole = torch.stack([runs[0].bincount()[runs[0]] == width for runs in tilings])  # and not cut at an end
        fall = (torch.stack(falls).float() * whole).sum(0) / whole.sum(0)
        return torch.zeros(len(text.words)).index_copy(0, torch.tensor(seen), fall.cpu())

    return _mean_over_steps(calls, model, text, scores, "ablation")


METHODS: Final = {"ablation": ablation, "gradient_norm": gradient_norm, "integrated_gradients": integrated_gradients}


@torch.no_grad()
def pinned_map(call: StepCall, model: Denoiser, *, probes: int, lane: Lane = "conditional") -> Tensor:
    """Where an image is pinned: the trajectory LID by places, from the probes that the guard itself would draw.

    ``v * (J v)``, summed over the channels only (`sd_guard.statistics.lid.ProbeProducts`): times C, the map sums to the
    trajectory LID of the same probes. It falls to 0 everywhere at high noise levels: compare places, not steps. Each of
    the `probes` Rademacher vectors costs a lane an image.

    Returns:
        (B, H, W) share of a place's C directions left open: about 0 where it is pinned, at most about 1, with noise.

    Raises:
        ValueError: no probes, or a lane that the sampler did not evaluate.
    """
    if probes < 1:
        raise ValueError(f"probes={probes} measure nothing: give at least 1")
    product, e_hat, predict = FiniteDifference(), model.read(call, lane).e_hat, model.noise_function(call, lane)
    shape, device = call.x.shape[1:], call.x.device
    probe = (draw_row_probes(model.seeds, shape, call.step, device, number) for number in range(probes))
    closed = torch.stack([(v * product(predict, call.x, v, e_hat)).mean(1) for v in probe]).mean(0)
    return 1 - call.level.s * closed


def _mean_over_steps(
    calls: Sequence[StepCall], model: Denoiser, text: PromptText, scores: Callable[[EmbedsFunction], Tensor], by: Method
) -> WordAttribution:
    if not calls:
        raise ValueError("calls is empty: give the steps that the guard observes")
    mean = torch.stack([scores(statistic_of(call, model)).detach().cpu() for call in calls]).mean(0)
    if not mean.isfinite().all():
        raise ValueError("the UNet's answers or their gradients are not finite: load the model in float32")
    positive = mean.clamp(min=0).sum()
    shares = mean / positive if positive > 0 else torch.zeros_like(mean)
    return WordAttribution(words=text.words, scores=tuple(shares.tolist()), method=by)


def _by_word(text: PromptText, values: Tensor) -> Tensor:
    """(T,) values of tokens to their sums over the words, (W,)."""
    owned = [(i, word) for i, word in enumerate(text.word_of_token) if word is not None]
    tokens, words = (torch.tensor(index, dtype=torch.int64, device=values.device) for index in zip(*owned, strict=True))
    return values.new_zeros(len(text.words)).index_add(0, words, values[tokens])


@contextmanager
def _hooked(pipe: Any, change: Callable[[Tensor], Tensor | None]) -> Generator[None, None, None]:
    """Has `change` replace the token embeddings, (N, T, width), that the text encoder starts from; None leaves them."""
    layer = pipe.text_encoder.get_input_embeddings()
    handle = layer.register_forward_hook(lambda _layer, _ids, embedded: change(embedded))
    try:
        yield
    finally:
        handle.remove()


def _captum(method: Method) -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise ImportError(f"{method} needs captum; pip install 'sd-guard[explain]'") from error
    return attr
