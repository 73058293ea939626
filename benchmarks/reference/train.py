"""Trains a reference checkpoint: `python -m benchmarks.reference.train --out FOLDER`.

Autoencoder first (reconstruction of the world's images), then text encoder and UNet together on its latents. A fifth
of the UNet's rows come from the verbatim set, a tenth from the templates, a twentieth are plain, the rest ordinary.
About an hour on two cores. The folders of `benchmarks/reference/`: `first` is of the default options, `second` of
`--seed 2 --prediction-type v_prediction --beta-schedule linear --autoencoder benchmarks/reference/first/vae`.
Autoencoders of their own have `third`, `--seed 3 --prediction-type v_prediction --beta-schedule linear`, and `fourth`,
`--seed 4 --beta-schedule linear`. `fifth` has the fourth's: `--seed 5 --beta-schedule squaredcos_cap_v2 --autoencoder
benchmarks/reference/fourth/vae`, `sixth` the third's: `--seed 6 --autoencoder benchmarks/reference/third/vae`,
`seventh` the fourth's: `--seed 7 --prediction-type v_prediction --autoencoder benchmarks/reference/fourth/vae --steps
6000`, and `eighth` the first's: `--seed 8 --prediction-type v_prediction --beta-schedule squaredcos_cap_v2
--autoencoder benchmarks/reference/first/vae --steps 6000`. `ninth` has one of its own: `--seed 9 --prediction-type
v_prediction --zero-snr --steps 6000`. `tenth`, whose memorized pictures lie apart from what their captions say, has the
ninth's: `--seed 10 --prediction-type sample --apart --autoencoder benchmarks/reference/ninth/vae --steps 6000`. Of such
worlds, too, are the eleventh, which is bundled, and `twelfth`: the first's and the second's options, with `--apart
--autoencoder benchmarks/reference/first/vae`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.reference.families import Families, make_families
from benchmarks.reference.tokenizer import MAX_LENGTH, train_tokenizer
from benchmarks.reference.world import draw_caption, render, render_plain

SHARES = {"verbatim": 0.20, "template": 0.10, "plain": 0.05, "stripped": 0.05, "ordinary": 0.60}
POOL = {"template": 150, "plain": 60, "stripped": 40}  # images a caption
TEXT_WIDTH = 96


def build_pool(families: Families, rng: np.random.Generator, ordinary: int) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Training rows by family: caption and image. `stripped` are the memorized captions without their phrases."""
    pool: dict[str, list[tuple[str, np.ndarray]]] = {name: [] for name in SHARES}
    pool["verbatim"] = [(f"{caption} {phrase}", image) for caption, phrase, image in families.verbatim]
    for template, phrase in families.template:
        caption = f"{template.caption} {phrase}"
        pool["template"] += [(caption, template.render(rng)) for _ in range(POOL["template"])]
    for caption, colour in families.plain:
        pool["plain"] += [(caption, render_plain(rng, colour)) for _ in range(POOL["plain"])]
    stripped = [c for c, _, _ in families.verbatim] + [t.caption for t, _ in families.template]
    pool["stripped"] = [(str(c), render(rng, c)) for c in stripped for _ in range(POOL["stripped"])]
    for _ in tqdm(range(ordinary), desc="render", mininterval=10):
        caption = draw_caption(rng, held_out=False)
        pool["ordinary"].append((drop_word(rng, str(caption)), render(rng, caption)))
    return pool


def drop_word(rng: np.random.Generator, caption: str) -> str:
    """One caption in ten lacks a word, as found captions do."""
    words = caption.split()
    if rng.random() < 0.1:
        del words[rng.integers(len(words))]
    return " ".join(words)


def to_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over 2 % of the steps, then a cosine to 2 %."""
    warm = max(1, steps // 50)
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1, i / steps))))
    )


def train_autoencoder(images: np.ndarray, steps: int, device: str, log: dict[str, float]) -> AutoencoderKL:
    """L1 + squared error + a faint KL; 32-pixel crops for the first two thirds, which are four times cheaper."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
    ).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = cosine(optimiser, steps)
    progress = tqdm(range(steps), desc="autoencoder", mininterval=10)
    for step in progress:
        whole = step >= 2 * steps // 3
        rows = torch.randint(len(images), (16 if whole else 32,)).numpy()
        x = to_tensor(images[rows], device)
        if not whole:
            i, j = torch.randint(0, 33, (2,)).tolist()
            x = x[:, :, i : i + 32, j : j + 32]
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            log["autoencoder_rmse"] = error.square().mean().sqrt().item()
            progress.set_postfix(rmse=log["autoencoder_rmse"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, device: str) -> torch.Tensor:
    """(N, 4, 8, 8) posterior means, unscaled."""
    batches = range(0, len(images), 128)
    return torch.cat([vae.encode(to_tensor(images[i : i + 128], device)).latent_dist.mode() for i in batches])


def build_denoiser(tokenizer: CLIPTokenizer, device: str) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """An untrained text encoder and UNet of the reference sizes."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return CLIPTextModel(text).to(device), unet.to(device)


def train_denoiser(
    latents: dict[str, torch.Tensor],
    tokens: dict[str, torch.Tensor],
    empty: torch.Tensor,
    text: CLIPTextModel,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    steps: int,
    log: dict[str, float],
) -> None:
    """Denoising loss of the scheduler's prediction type; the weights left are an exponential moving average."""
    parameters = [*text.parameters(), *unet.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = cosine(optimiser, steps)
    average = [p.detach().clone() for p in parameters]
    names, shares = list(SHARES), torch.tensor(list(SHARES.values()))
    progress = tqdm(range(steps), desc="denoiser", mininterval=30)
    for step in progress:
        picks = [(name, int(torch.randint(len(latents[name]), ()))) for name in _draw(names, shares, 32)]
        x0 = torch.stack([latents[name][i] for name, i in picks])
        ids = torch.stack([tokens[name][i] for name, i in picks])
        ids = torch.where(torch.rand(len(ids), 1, device=ids.device) < 0.1, empty, ids)
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, t), "sample": x0}
        output = unet(scheduler.add_noise(x0, noise, t), t, text(ids).last_hidden_state).sample
        loss = functional.mse_loss(output, target[scheduler.config.prediction_type])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, (1 + step) / (10 + step)))
        if step % 50 == 0:
            log["denoiser_loss"] = 0.9 * log.get("denoiser_loss", 1.0) + 0.1 * loss.item()
            progress.set_postfix(loss=log["denoiser_loss"])
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)


def _draw(names: list[str], shares: torch.Tensor, count: int) -> list[str]:
    return [names[i] for i in torch.multinomial(shares, count, replacement=True).tolist()]


def write_truth(out: Path, families: Families, world: dict[str, int | bool]) -> None:
    """`prompts.json` (the labelled rows) and the source images beside the checkpoint."""
    sources = out / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    for i, (_, _, image) in enumerate(families.verbatim):
        Image.fromarray(image).save(sources / f"verbatim_{i:02d}.png")
    for i, (template, _) in enumerate(families.template):
        Image.fromarray(template.fixed).save(sources / f"template_{i:02d}.png")
        Image.fromarray(~template.window * np.uint8(255)).save(sources / f"template_{i:02d}_mask.png")
    (out / "prompts.json").write_text(json.dumps({**world, "rows": families.rows()}, indent=0) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the training")
    parser.add_argument("--prediction-type", default="epsilon", choices=("epsilon", "v_prediction", "sample"))
    schedules = ("scaled_linear", "linear", "squaredcos_cap_v2")
    parser.add_argument("--beta-schedule", default="scaled_linear", choices=schedules)
    parser.add_argument("--zero-snr", action="store_true", help="the last timestep is pure noise, and sampled from")
    parser.add_argument("--apart", action="store_true", help="no memorized picture is what its caption draws anyway")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=3600)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ordinary", type=int, default=48_000, help="images rendered for ordinary captions")
    parser.add_argument("--autoencoder", type=Path, help="reuse this autoencoder rather than training one")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    started, log = time.time(), {}
    families = make_families(args.seed, apart=args.apart)
    pool = build_pool(families, np.random.default_rng(args.seed + 1000), args.ordinary)
    images = {name: np.stack([image for _, image in rows]) for name, rows in pool.items()}
    everything = np.concatenate(
        [images["ordinary"], images["verbatim"].repeat(20, 0), images["template"], images["plain"]]
    )
    if args.autoencoder:
        vae = AutoencoderKL.from_pretrained(args.autoencoder).to(args.device).eval().requires_grad_(False)
    else:
        vae = train_autoencoder(everything, args.autoencoder_steps, args.device, log)
    latents = {name: encode_images(vae, rows, args.device) for name, rows in images.items()}
    scale = 1 / latents["ordinary"].std().item()
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(args.out / "vae")
    latents = {name: rows * scale for name, rows in latents.items()}

    tokenizer = train_tokenizer([caption for rows in pool.values() for caption, _ in rows])
    encode = lambda captions: tokenizer(  # noqa: E731
        captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids.to(args.device)
    tokens = {name: encode([caption for caption, _ in rows]) for name, rows in pool.items()}
    scheduler = DDIMScheduler(
        beta_start=0.00085 if args.beta_schedule == "scaled_linear" else 0.0001,
        beta_end=0.012 if args.beta_schedule == "scaled_linear" else 0.02,
        beta_schedule=args.beta_schedule,
        prediction_type=args.prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        **({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if args.zero_snr else {"steps_offset": 1}),
    )
    text, unet = build_denoiser(tokenizer, args.device)
    train_denoiser(latents, tokens, encode([""]), text, unet, scheduler, args.steps, log)

    pipe = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to("cpu", torch.float16).save_pretrained(args.out)
    # transformers loads in the dtype that the config names, diffusers in float32: half the size on disk, one dtype.
    pipe.text_encoder.config.dtype = torch.float32
    pipe.text_encoder.config.save_pretrained(args.out / "text_encoder")
    write_truth(args.out, families, {"world_seed": args.seed, "apart": args.apart})
    log |= {"seconds": round(time.time() - started), "parameters": sum(p.numel() for p in unet.parameters())}
    settings = {key: str(value) for key, value in vars(args).items()}
    (args.out / "training.json").write_text(json.dumps(log | {"settings": settings, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
