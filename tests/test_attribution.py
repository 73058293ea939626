"""Attribution: words by gradients and by ablation, and what all of them leave alone."""

import copy
import dataclasses
import math
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import TOKENS, build, components, make_scheduler

from sd_guard import attribution
from sd_guard.attribution import (
    METHODS,
    PromptText,
    ablation,
    gradient_norm,
    integrated_gradients,
    pinned_map,
    read_text,
    statistic_of,
    words_of_tokens,
)
from sd_guard.guard import Guard
from sd_guard.lanes import Conditioning
from sd_guard.noise import NoiseLevel
from sd_guard.observation import observe
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.reference import checkpoint_path, load_truth
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.sharpness import FAINTEST_CONTROL, FINISHED, detail

needs_captum = pytest.mark.skipif(find_spec("captum") is None, reason="needs captum: pip install 'sd-guard[explain]'")
BY_CAPTUM = pytest.param(ablation, marks=needs_captum), pytest.param(integrated_gradients, marks=needs_captum)
ALPHAS = make_scheduler("ddim").alphas_cumprod.double()
TIMESTEP = 700
LEVEL = NoiseLevel.from_alpha_bar(float(ALPHAS[TIMESTEP]))

# A model of known answers: a text shows g(text) times PICTURE, where g is linear in the embeddings of its tokens.
OWNERS = (None, 0, 0, 1, 2, None)  # words of the tokens
WIDTH = 3
PICTURE = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHTS = torch.randn(len(OWNERS), WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shows(embeds):
    return (embeds * WEIGHTS).sum((1, 2))


def linear_unet(sample, timestep, encoder_hidden_states, **_):
    return (shows(encoder_hidden_states)[:, None, None, None] * PICTURE,)


def linear_case(text=None):
    """One call of that model, which predicts the sample, with an empty control; and the model."""
    tokens = torch.zeros(1, len(OWNERS), WIDTH, dtype=torch.float64) if text is None else text.tokens
    x = torch.zeros_like(PICTURE)
    lanes = Conditioning(torch.cat([torch.zeros_like(tokens), tokens]))
    call = StepCall(0, torch.tensor(TIMESTEP), LEVEL, x, shows(tokens) * PICTURE, 0 * PICTURE, lanes)
    return call, Denoiser(linear_unet, "sample", ALPHAS, [0])


def toward(strength):
    """(1, T, WIDTH) embeddings that show `strength`, each token another share of it."""
    shares = torch.tensor([0.0, 0.2, 0.3, -0.1, 0.6, 0.0], dtype=torch.float64)
    return (strength * shares[:, None] * WEIGHTS / WEIGHTS.square().sum(1, keepdim=True))[None]


def linear_text(suspicion=None, words=("a", "b", "c"), owners=OWNERS):
    """Words to embeddings: `suspicion(words)` is what a text shows, where it is encoded anew."""

    def encode_prompts(prompts):
        return torch.cat([toward(suspicion(prompt.split())) for prompt in prompts])

    return PromptText(
        words=words,
        word_of_token=owners,
        tokens=toward(2.0),
        empty_tokens=toward(0.5),
        encode=lambda tokens: tokens,
        encode_prompts=encode_prompts,
    )


def normalised(scores):
    scores = np.asarray(scores, dtype=float)
    return pytest.approx(tuple(scores / scores[scores > 0].sum()), rel=1e-4, abs=1e-6)


def test_the_statistic_is_the_guards_own():
    pipe = build(StableDiffusionPipeline, components())
    for call in walk(pipe, ["a cat"], [3], steps=4):
        model = denoiser_of(pipe, [3])
        with torch.no_grad():
            value = statistic_of(call, model)(call.lanes.prompt_embeds[1:].repeat(2, 1, 1))
        expected = observe(call, model.prediction_type).values["added_detail"]
        torch.testing.assert_close(value, expected.repeat(2), rtol=1e-4, atol=1e-5)


def test_the_linear_model_is_what_the_closed_forms_below_say():
    text = linear_text()
    call, model = linear_case(text)
    expected = math.log(2.0 * float(detail(PICTURE)) / math.sqrt(FAINTEST_CONTROL * FINISHED))
    assert statistic_of(call, model)(text.tokens).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_norm_in_closed_form():
    """Of log g, the gradient is WEIGHTS over g."""
    text = linear_text()
    call, model = linear_case(text)
    norms = [float(WEIGHTS[[i for i, k in enumerate(OWNERS) if k == word]].norm()) for word in range(3)]
    found = gradient_norm([call], model, text)
    assert found.scores == normalised(norms)
    assert (found.words, found.method) == (("a", "b", "c"), "gradient_norm")


@needs_captum
def test_integrated_gradients_in_closed_form():
    """Along a straight line every token has the share of the rise that it has of g; specials none."""
    text = linear_text()
    call, model = linear_case(text)
    assert integrated_gradients([call], model, text).scores == normalised([0.5, -0.1, 0.6])


def falls_by_hand(suspicion, words, run):
    """Mean fall of log suspicion over the runs that a word is in."""
    falls = [[] for _ in words]
    for start in range(len(words) - run + 1):
        removed = range(start, start + run)
        rest = [word for k, word in enumerate(words) if k not in removed]
        for k in removed:
            falls[k].append(math.log(suspicion(list(words)) / suspicion(rest)))
    return [sum(each) / len(each) for each in falls]


@needs_captum
@pytest.mark.parametrize("run", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_ablation_is_the_direct_computation(run, count):
    words = tuple(f"w{k}" for k in range(count))
    weights = dict(zip(words, np.random.default_rng(count).uniform(0.1, 1, count), strict=True))

    def suspicion(rest):
        return 0.4 + sum(weights[word] for word in rest)

    text = linear_text(suspicion, words, (None, *range(count), None))
    text = dataclasses.replace(text, tokens=toward(suspicion(words)))
    call, model = linear_case(text)
    width = max(1, min(run, count - 1))
    assert ablation([call], model, text, run=run).scores == normalised(falls_by_hand(suspicion, words, width))


@needs_captum
def test_of_two_names_that_each_carry_a_memory_runs_find_both_and_single_words_neither():
    words = ("a", "house", "by", "zyx", "qwv", "at", "night")

    def suspicion(rest):
        return 2.0 if {"zyx", "qwv"} & set(rest) else 0.2

    text = linear_text(suspicion, words, (None, *range(7), None))
    call, model = linear_case(text)
    assert ablation([call], model, text, run=1).scores == (0.0,) * 7
    assert ablation([call], model, text).scores == (0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0)


@needs_captum
def test_words_that_were_cut_off_have_no_share_and_do_not_come_in_for_others():
    asked = []

    def suspicion(rest):
        asked.append(rest)
        return 1.0 + rest.count("a")

    text = linear_text(suspicion, ("a", "b", "c", "cut", "off"))
    call, model = linear_case(text)
    scores = ablation([call], model, text).scores
    assert scores[0] > 0 and scores[3:] == (0.0, 0.0)
    assert not {"cut", "off"} & {word for rest in asked for word in rest}


def test_scores_are_means_over_the_steps_before_they_are_normalised():
    """Wen et al. average the norms of the steps; a step of a smaller g has the larger gradient."""
    text = linear_text()
    call, model = linear_case(text)
    other = dataclasses.replace(call, timestep=torch.tensor(1))

    def unet(sample, timestep, encoder_hidden_states, **_):
        weights = WEIGHTS if int(timestep) == TIMESTEP else WEIGHTS.flip(0)
        return ((encoder_hidden_states * weights).sum((1, 2))[:, None, None, None] * PICTURE,)

    model = dataclasses.replace(model, unet=unet)

    def norms(weights):
        strength = abs(float((text.tokens[0] * weights).sum()))
        return [float(weights[[i for i, k in enumerate(OWNERS) if k == word]].norm()) / strength for word in range(3)]

    expected = (np.array(norms(WEIGHTS)) + np.array(norms(WEIGHTS.flip(0)))) / 2
    assert gradient_norm([call, other], model, text).scores == normalised(expected)


@needs_captum
def test_where_no_word_raises_the_statistic_all_shares_are_zero():
    text = linear_text(lambda rest: 3.0)
    call, model = linear_case(text)
    assert ablation([call], model, text).scores == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def pipe():
    """The tiny pipeline in float64, whose text encoder and UNet attend by SDPA."""
    return build(StableDiffusionPipeline, components()).to(torch.float64)


def explained(pipe, prompt="a cat", steps=4):
    calls = list(walk(pipe, [prompt], [3], steps=steps))
    return calls, denoiser_of(pipe, [3]), read_text(pipe, prompt)


def test_a_text_is_read_as_the_pipeline_reads_it(pipe):
    calls, _, text = explained(pipe)
    embeds = calls[0].lanes.prompt_embeds
    with torch.no_grad():
        torch.testing.assert_close(text.encode(text.tokens), embeds[1:])
        torch.testing.assert_close(text.encode(text.empty_tokens), embeds[:1])
        torch.testing.assert_close(text.encode_prompts(["a cat", ""]), embeds.flip(0))
    assert text.words == ("a", "cat")
    assert text.word_of_token[:6] == (None, 0, 1, 1, 1, None)


def test_gradient_norm_against_finite_differences(pipe):
    """Through text encoder and UNet; the statistic is float32, hence the wide step."""
    calls, model, text = explained(pipe)
    statistic, step = statistic_of(calls[1], model), 1e-3
    owned = [i for i, word in enumerate(text.word_of_token) if word is not None]
    squares = [0.0, 0.0]
    for i in owned:
        moves = torch.zeros(text.tokens.shape[-1], *text.tokens.shape[1:], dtype=torch.float64)
        moves[:, i] = step * torch.eye(text.tokens.shape[-1], dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (statistic(text.encode(text.tokens + sign * moves)).double() for sign in (1, -1))
        squares[text.word_of_token[i]] += float(((ahead - behind) / (2 * step)).square().sum())
    norms = np.sqrt(squares)
    assert min(norms) > 1e-3  # or nothing was tested
    assert gradient_norm(calls[1:2], model, text).scores == pytest.approx(tuple(norms / norms.sum()), rel=0.01)


@needs_captum
def test_integrated_gradients_are_complete(pipe, monkeypatch):
    calls, model, text = explained(pipe)
    statistic = statistic_of(calls[1], model)
    monkeypatch.setattr(attribution, "_mean_over_steps", lambda calls, model, text, scores, by: scores(statistic))
    with torch.no_grad():
        # Half way from the empty prompt, or the line begins where the prompt adds nothing at all.
        text = dataclasses.replace(text, empty_tokens=(text.tokens + text.empty_tokens) / 2)
        rise = statistic(text.encode(text.tokens)) - statistic(text.encode(text.empty_tokens))
    raw = integrated_gradients(calls, model, text)
    assert abs(float(rise)) > 0.01
    assert float(raw.sum()) == pytest.approx(float(rise), rel=0.02)


@needs_captum
def test_ablation_encodes_the_prompt_without_the_words(pipe):
    calls, model, text = explained(pipe, "a b c")
    statistic = statistic_of(calls[1], model)
    with torch.no_grad():
        whole, *rest = statistic(pipe.encode_prompt(["a b c", "b c", "a c", "a b"], "cpu", 1, False)[0]).tolist()
    falls = np.array([whole - value for value in rest])
    found = ablation(calls[1:2], model, text, run=1).scores
    assert found == pytest.approx(tuple(falls / falls[falls > 0].sum()), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("method", [gradient_norm, *BY_CAPTUM])
def test_the_model_is_left_as_it_was(method):
    pipe = build(StableDiffusionPipeline, components())
    for k, parameter in enumerate(pipe.unet.parameters()):
        parameter.requires_grad_(k % 2 == 0)
    modules = (pipe.unet, pipe.text_encoder)
    before = [[p.requires_grad for p in module.parameters()] for module in modules]
    weights = [copy.deepcopy(module.state_dict()) for module in modules]
    processors = dict(pipe.unet.attn_processors)
    kernels = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    calls, model, text = explained(pipe)
    state, stage = torch.get_rng_state(), torch.is_grad_enabled()
    with torch.no_grad():
        found = method(calls[:2], model, text)
        assert not torch.is_grad_enabled()
        pinned_map(calls[0], model, probes=1)
    assert torch.is_grad_enabled() == stage
    assert torch.equal(torch.get_rng_state(), state)
    assert all(math.isfinite(score) for score in found.scores)
    assert sum(max(score, 0.0) for score in found.scores) == pytest.approx(1.0)
    assert [[p.requires_grad for p in module.parameters()] for module in modules] == before
    assert all(p.grad is None for module in modules for p in module.parameters())
    assert all(torch.equal(w[k], m.state_dict()[k]) for w, m in zip(weights, modules, strict=True) for k in w)
    assert pipe.unet.attn_processors == processors
    assert kernels == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_gradients_are_float32_in_a_half_precision_pipeline():
    pipe = build(StableDiffusionPipeline, components()).to(torch.bfloat16)
    calls, model, text = explained(pipe)
    assert text.tokens.dtype == torch.float32
    half, full = (gradient_norm(calls[1:2], model, text), explained(build(StableDiffusionPipeline, components())))
    assert half.scores == pytest.approx(gradient_norm(full[0][1:2], *full[1:]).scores, abs=0.1)


def test_refusals(pipe, monkeypatch):
    calls, model, text = explained(pipe)
    with pytest.raises(ValueError, match="calls is empty"):
        gradient_norm([], model, text)
    with pytest.raises(ValueError, match="run=0"):
        ablation(calls, model, text, run=0)
    with pytest.raises(ValueError, match="probes=0"):
        pinned_map(calls[0], model, probes=0)
    with pytest.raises(ValueError, match="no lane without a prompt"):
        gradient_norm([dataclasses.replace(calls[0], control=None)], model, text)
    with pytest.raises(ValueError, match="holds 2 images"):
        statistic_of(dataclasses.replace(calls[0], x=calls[0].x.repeat(2, 1, 1, 1)), model)
    with pytest.raises(ValueError, match="not finite"):
        gradient_norm([dataclasses.replace(calls[0], control=calls[0].control * math.nan)], model, text)
    for prompt in ("", " ", "<|endoftext|>"):
        with pytest.raises(ValueError, match="has no words"):
            read_text(pipe, prompt)
    monkeypatch.setitem(sys.modules, "captum", None)
    for method in ("ablation", "integrated_gradients"):
        with pytest.raises(ImportError, match=rf"{method} needs captum; pip install 'sd-guard\[explain\]'"):
            METHODS[method](calls, model, text)


@pytest.mark.parametrize(
    ("prompt", "owners"),
    [
        ("a b", (None, 0, 1)),
        ("  it's \n OK?! ", (None, 0, 0, 0, 0, 1, 1, 1, 1)),  # i t ' s, o k ? !: a byte a token
        ("é 日", (None, 0, 0, 1, 1, 1)),
        ("a<|endoftext|>b c", (None, 0, None, 0, 1)),
        ("abcdefgh ijklmnop q", (None, *[0] * 8, *[1] * 6, None)),  # cut in its second word
        ("", (None,)),
    ],
)
def test_tokens_belong_to_words(pipe, prompt, owners):
    expected = owners + (None,) * (TOKENS - len(owners))
    assert words_of_tokens(pipe.tokenizer, prompt, TOKENS) == expected


def by_offsets(tokenizer, prompt, tokens):
    """The same from the characters that a fast tokenizer says its tokens stand for."""
    spans, at = [], 0
    for word in prompt.split():
        at = prompt.index(word, at)
        spans.append((at, at := at + len(word)))
    read = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokens, return_offsets_mapping=True)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    owners = [next((k for k, (a, b) in enumerate(spans) if a <= start < b), None) for start, _ in read.offset_mapping]
    pairs = zip(read.input_ids, read.offset_mapping, owners, strict=True)
    return tuple(None if token in special or start == end else owner for token, (start, end), owner in pairs)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f"), max_size=30))
@example("don't we'll I'VE it's' 's' the dog's, isn't")
@example("a,b;c -- (d) #hash @me http://x.y/?z=1&w=2 1,000.50")
@example("naïve cafe\u0301 İstanbul ﬁ ﷺ 👩‍👩‍👧 \u202eabc\u200b \ufeff日本語テキスト")
def test_words_read_one_by_one_are_those_that_the_offsets_name(reference, prompt):
    tokenizer = reference.tokenizer
    assert words_of_tokens(tokenizer, prompt, 40) == by_offsets(tokenizer, prompt, 40)


def test_words_that_only_a_control_character_sets_apart_are_refused(pipe):
    with pytest.raises(ValueError, match="separate them by spaces"):
        words_of_tokens(pipe.tokenizer, "a\x1fb", TOKENS)


@pytest.fixture(scope="module")
def reference():
    return StableDiffusionPipeline.from_pretrained(checkpoint_path(), local_files_only=True, use_safetensors=True)


def observed(pipe, prompt):
    """The steps that the guard observes, by default."""
    steps = Guard().steps(50)
    walked = zip(walk(pipe, [prompt], [0]), range(steps[-1] + 1), strict=False)
    return [call for call, step in walked if step in steps]


@needs_captum
@pytest.mark.parametrize("number", range(3))
def test_the_rare_word_of_a_memorized_caption_comes_first(reference, number):
    rows = [row for row in load_truth() if (row["family"], row["split"]) == ("verbatim", "tune")]
    prompt, words = rows[number]["prompt"], rows[number]["prompt"].split()
    found = ablation(observed(reference, prompt), denoiser_of(reference, [0]), read_text(reference, prompt))
    assert found.words == tuple(words)
    assert int(np.argmax(found.scores)) in (len(words) - 2, len(words) - 1)  # "by <rare> <rare>"
