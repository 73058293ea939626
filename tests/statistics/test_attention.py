"""Recorded attention against the weights of the UNet, and what it leaves behind: nothing."""

import copy
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from torch import nn

from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.statistics.attention import conditional_attention, record_attention
from sd_guard.statistics.attention_entropy import AttentionEntropy
from sd_guard.statistics.bright_ending import BrightEnding, LocalGuidanceNorm, end_map
from tests.statistics.cases import PROMPTS, SEEDS, tiny_calls, tiny_pipe


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def call(pipe):
    return tiny_calls(pipe, steps=2)[-1]


@pytest.fixture
def recorded(pipe, call):
    """The maps by block, in the order of evaluation."""
    return {item.block: item.weights for item in conditional_attention(call, denoiser_of(pipe, SEEDS))}


def by_hand(pipe, call):
    """softmax(q k / sqrt d) of every block from its weight matrices and the inputs seen by plain hooks on to_q."""
    seen = {}
    text = call.lanes.prompt_embeds[len(PROMPTS) :]
    blocks = {name: module for name, module in pipe.unet.named_modules() if name.endswith("attn2")}
    hooks = [
        block.to_q.register_forward_hook(lambda _, inputs, __, name=name: seen.__setitem__(name, inputs[0]))
        for name, block in blocks.items()
    ]
    pipe.unet(call.x, call.timestep, encoder_hidden_states=text)
    for hook in hooks:
        hook.remove()
    maps = {}
    for name, hidden in seen.items():
        block = blocks[name]
        q = (hidden @ block.to_q.weight.T).unflatten(2, (block.heads, -1))
        k = (text @ block.to_k.weight.T).unflatten(2, (block.heads, -1))
        logits = torch.einsum("bphd,bthd->bhpt", q, k) / math.sqrt(q.shape[-1])
        maps[name] = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return maps


@torch.no_grad()
def test_equals_the_softmax_of_the_weights(pipe, call, recorded):
    expected = by_hand(pipe, call)
    assert list(recorded) == list(expected) and len(recorded) == 4
    assert [name.split("_")[0] for name in recorded] == ["down", "mid", "up", "up"]
    for name, weights in recorded.items():
        assert weights.shape[0] == len(PROMPTS) and weights.dtype == torch.float64
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        torch.testing.assert_close(weights, expected[name])


def test_the_output_is_that_of_the_bare_unet(pipe, call):
    text = call.lanes.prompt_embeds[len(PROMPTS) :]
    with torch.no_grad():
        bare = pipe.unet(call.x, call.timestep, encoder_hidden_states=text).sample
        with record_attention(pipe.unet) as maps:
            beside = pipe.unet(call.x, call.timestep, encoder_hidden_states=text).sample
        pipe.unet(call.x, call.timestep, encoder_hidden_states=text)
    assert torch.equal(bare, beside)
    assert len(maps) == 4  # of the call inside only


class Foreign(nn.Module):
    """A processor with weights of its own, as adapters have."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.inner = AttnProcessor()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask)


@pytest.mark.parametrize(
    "make", [AttnProcessor, lambda: SlicedAttnProcessor(1), Foreign], ids=["plain", "sliced", "own"]
)
@pytest.mark.parametrize("fails", [False, True])
@torch.no_grad()
def test_every_processor_stays_the_same_object(pipe, call, recorded, make, fails):
    unet = copy.deepcopy(pipe.unet)
    unet.set_attn_processor({name: make() for name in unet.attn_processors})
    before = dict(unet.attn_processors)
    text = call.lanes.prompt_embeds[len(PROMPTS) :]
    try:
        with record_attention(unet) as maps:
            unet(call.x, call.timestep, encoder_hidden_states=text)
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert {name: id(item) for name, item in before.items()} == {n: id(p) for n, p in unet.attn_processors.items()}
    assert not any(module._forward_pre_hooks for module in unet.modules())
    for item in maps:
        torch.testing.assert_close(item.weights, recorded[item.block])


def test_half_precision_is_computed_in_float32(pipe, call, recorded):
    unet = copy.deepcopy(pipe.unet).to(torch.bfloat16)
    text = call.lanes.prompt_embeds[len(PROMPTS) :].bfloat16()
    with torch.no_grad(), record_attention(unet) as maps:
        unet(call.x.bfloat16(), call.timestep, encoder_hidden_states=text)
    for item in maps:
        assert item.weights.dtype == torch.float32
        torch.testing.assert_close(item.weights.double(), recorded[item.block], rtol=0.1, atol=0.01)


def test_masked_tokens_get_nothing(pipe, call):
    text = call.lanes.prompt_embeds[len(PROMPTS) :]
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    mask[:, 5:] = False
    with torch.no_grad(), record_attention(pipe.unet) as maps:
        pipe.unet(call.x, call.timestep, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert all(item.weights[..., 5:].max() < 1e-12 for item in maps)


def test_refuses_what_has_no_attention(call):
    with pytest.raises(TypeError, match="unet=Linear"), record_attention(nn.Linear(1, 1)):
        pass
    with pytest.raises(TypeError, match="unet=function"), record_attention(lambda *_: None):
        pass


def test_entropy_of_one_block_and_of_all(pipe, call, recorded):
    model = denoiser_of(pipe, SEEDS)
    averages = [weights.mean((1, 2)) for weights in recorded.values()]
    entropy = [torch.distributions.Categorical(probs=item).entropy() for item in averages]
    for layer, expected in enumerate(entropy):
        torch.testing.assert_close(AttentionEntropy(layer=layer).measure(call, model), expected)
    of_all = torch.distributions.Categorical(probs=sum(averages) / len(averages)).entropy()
    torch.testing.assert_close(AttentionEntropy(layer=None).measure(call, model), of_all)
    assert (of_all <= math.log(call.lanes.prompt_embeds.shape[1])).all()


def test_entropy_refuses_a_block_that_is_not_there(pipe, call):
    with pytest.raises(ValueError, match="layer=4 of 4"):
        AttentionEntropy(layer=4).measure(call, denoiser_of(pipe, SEEDS))
    with pytest.raises(ValueError, match="layer=-1"):
        AttentionEntropy(layer=-1)


@pytest.mark.parametrize("token", [-1, 3])
def test_bright_ending_is_the_finest_map_of_the_down_path(pipe, call, recorded, token):
    model = denoiser_of(pipe, SEEDS)
    (down,) = (weights for name, weights in recorded.items() if name.startswith("down"))
    expected = down[..., token].mean(1).reshape(len(PROMPTS), 4, 4)
    torch.testing.assert_close(end_map(call, model, token), expected)
    torch.testing.assert_close(BrightEnding(token=token).measure(call, model), expected.mean((1, 2)))
    mask = nn.functional.interpolate(expected[:, None], scale_factor=2, mode="bilinear")
    guidance = (call.conditional - call.control) * mask
    norm = (guidance**2).sum((1, 2, 3)).sqrt() / mask.mean((1, 2, 3))
    torch.testing.assert_close(LocalGuidanceNorm(token=token).measure(call, model), norm)


def test_two_blocks_of_the_latents_resolution_are_averaged_and_coarser_ones_left_out(pipe):
    """As in Stable Diffusion: attention at full resolution, two blocks of it, and a coarser level below."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=2,
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=32,
    ).eval()
    own = type(pipe)(**{**pipe.components, "unet": unet.double()}, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    call, model = tiny_calls(own, steps=1)[0], denoiser_of(own, SEEDS)
    down = [m.weights for m in conditional_attention(call, model) if m.block.startswith("down_blocks.0")]
    expected = (down[0] + down[1])[..., -1].mean(1).reshape(len(PROMPTS), 8, 8) / 2
    assert len(down) == 2
    torch.testing.assert_close(end_map(call, model, -1), expected)
    ratio = (((call.conditional - call.control) * expected[:, None]) ** 2).sum((1, 2, 3)).sqrt() / expected.mean((1, 2))
    torch.testing.assert_close(LocalGuidanceNorm().measure(call, model), ratio)


def test_refuses_a_token_outside_the_text(pipe, call):
    with pytest.raises(ValueError, match="token=16"):
        BrightEnding(token=16).measure(call, denoiser_of(pipe, SEEDS))
