"""The UNet, on frozen latents and frozen text states: predict the noise. A few things first, then more: `--stages 24:1500 100:12500`
is 24 things up to step 1500, then 100 things up to step 12500. Run: `make train-diffusion`."""
import argparse, json, random
from pathlib import Path
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer
from . import autoencoder, data, text
from .fit import accelerator, fit
from .show import sheet

CONFIG = dict(sample_size=data.SIZE//8, in_channels=4, out_channels=4, block_out_channels=(48, 96, 128, 128), layers_per_block=1,
              cross_attention_dim=text.WIDTH, attention_head_dim=4, norm_num_groups=8,
              down_block_types=['CrossAttnDownBlock2D']*3+['DownBlock2D'], up_block_types=['UpBlock2D']+['CrossAttnUpBlock2D']*3)
SCHEDULE = dict(num_train_timesteps=1000, beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', set_alpha_to_one=False, steps_offset=1)
FOLDER = data.WORK/'diffusion'
VARIANTS, CAPTIONS = 4, 12      # of each picture: placings on white; captions for them. One placing and two captions for each colour.

def prompts() -> list[str]: return (data.HERE/'prompts.txt').read_text().split('\n')[:-1]

def stage_of(step: int, stages: list[tuple[int, int]]) -> int:
    "How many things are learnt at this step."
    return next(n for n, end in stages if step<end)

@torch.no_grad()
def latents(vae, rgba, seed=0, device='cpu'):
    "Scaled latents (pictures, VARIANTS + colours, 4, 16, 16): small random placings on white, then one on each colour."
    g, palette = torch.Generator().manual_seed(seed), data.palette()
    colours = torch.cat([palette[:1].expand(VARIANTS, 3), palette[1:]])
    out = []
    for picture in tqdm(rgba, desc='latents', mininterval=5):
        n = len(colours); matrix = data.affine(g, n, zoom=(.94, 1.04), shift=.03)
        pixels = data.compose(picture.expand(n, -1, -1, -1), colours, matrix).to(device)
        out.append((vae.encode(pixels).latent_dist.mode()*vae.config.scaling_factor).half().cpu())
    return torch.stack(out)

@torch.no_grad()
def text_states(encoder, tokenizer, captions, device='cpu'):
    "The last hidden states, half precision (N,77,width)."
    ids = text.tokenize(tokenizer, captions)
    return torch.cat([encoder(i.to(device))[0].half().cpu() for i in tqdm(ids.split(64), desc='captions', mininterval=5)])

def prepare(entries, rgba, vae, encoder, tokenizer, device):
    "Everything that does not change in training, computed once: latents, text states, the empty caption's state."
    rng, names = random.Random(0), list(data.COLOURS)
    captions = [data.caption(e, c, rng) for e in entries for c in ['white']*CAPTIONS + [n for n in names[1:] for _ in range(2)]]
    states = text_states(encoder, tokenizer, captions, device).unflatten(0, (len(entries), -1))
    return dict(latents=latents(vae, rgba, device=device), states=states, empty=text_states(encoder, tokenizer, [''], device)[0])

def drawer(ready, entries, stages, batch, coloured, drop=.1):
    "Pictures of this stage's things, each with one of its placings and captions, noise, a timestep; one caption in ten is empty."
    groups = {n: torch.tensor([i for i, e in enumerate(entries) if e['thing'] in data.things(n)]) for n, _ in stages}
    z, h, n_colours = ready['latents'], ready['states'], len(data.COLOURS)-1
    def draw(g, step):
        integer = lambda high: torch.randint(high, (batch,), generator=g)
        among = groups[stage_of(step, stages)]; i = among[integer(len(among))]
        tint, colour = torch.rand(batch, generator=g)<coloured, integer(n_colours)
        placing = torch.where(tint, VARIANTS+colour, integer(VARIANTS))
        words = torch.where(tint, CAPTIONS+2*colour+integer(2), integer(CAPTIONS))
        states = h[i, words].float(); states[torch.rand(batch, generator=g)<drop] = ready['empty'].float()
        return dict(z=z[i, placing].float(), states=states, t=integer(1000), noise=torch.randn(batch, *z.shape[2:], generator=g))
    return draw

def noisy(z, noise, t, alphas_cumprod):
    "x_t = sqrt(abar) x_0 + sqrt(1-abar) noise. Ho et al. 2020, arXiv:2006.11239, equation 4."
    abar = alphas_cumprod.to(z.device)[t].view(-1, 1, 1, 1)
    return (abar.sqrt()*z + (1-abar).sqrt()*noise).contiguous(memory_format=torch.channels_last)

def caption_gap(unet, ready, alphas_cumprod, device, among, n=64):
    "By how much of the loss the right caption beats a wrong one, at three timesteps: the number to watch from the first minute."
    pick = among[torch.linspace(0, len(among)-1, n).long()]
    z, h = ready['latents'][pick, 0].float().to(device), ready['states'][pick, 0].float().to(device)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(device); out = []
    for t in (950, 700, 400):
        x, steps = noisy(z, noise, torch.tensor([t]), alphas_cumprod), torch.full((n,), t, device=device)
        right, wrong = ((unet(x, steps, s).sample-noise).pow(2).mean().item() for s in (h, h.roll(n//3, 0)))
        out.append(f't{t} {100*(1-right/wrong):.1f} %')
    return ', '.join(out)

def pipeline(vae, encoder, tokenizer, unet, scheduler=None):
    "The parts as diffusers' pipeline."
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, safety_checker=None, feature_extractor=None,
                                   scheduler=scheduler or DDIMScheduler(clip_sample=False, **SCHEDULE), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True); return pipe

def draw_prompts(pipe, captions, steps=25, guidance=3., batch=24):
    "Pictures (N,3,H,W) in -1..1; picture k starts from seed k."
    seeds = [torch.Generator().manual_seed(k) for k in range(len(captions))]
    parts = [pipe(captions[k:k+batch], num_inference_steps=steps, guidance_scale=guidance, generator=seeds[k:k+batch], output_type='pt').images
             for k in range(0, len(captions), batch)]
    return torch.cat(parts)*2 - 1

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--stages', nargs='+', default=['24:1500', '100:12500'], help='things:last step')
    p.add_argument('--batch', type=int, default=16); p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--decay', type=float, default=.3); p.add_argument('--coloured', type=float, default=.15)
    p.add_argument('--init', type=Path, help='folder of a UNet to start from'); p.add_argument('--report-every', type=int, default=500)
    p.add_argument('--precision', default='no', choices=['no', 'bf16']); p.add_argument('--folder', type=Path, default=FOLDER); a = p.parse_args()
    stages = [tuple(map(int, s.split(':'))) for s in a.stages]; most = max(n for n, _ in stages)
    acc = accelerator(a.precision)
    vae = AutoencoderKL.from_pretrained(autoencoder.FOLDER/'vae').eval().to(acc.device)
    encoder = CLIPTextModel.from_pretrained(text.FOLDER/'text_encoder').eval().to(acc.device)
    tokenizer = CLIPTokenizer.from_pretrained(text.FOLDER/'tokenizer')
    everything, rgba = data.unpack()
    use = [i for i, e in enumerate(everything) if e['style'] in data.STYLES and e['thing'] in data.things(most) and not data.is_held_out(e)]
    entries, cache = [everything[i] for i in use], a.folder/f'ready-{most}.pt'
    with acc.main_process_first():
        if not cache.exists():
            a.folder.mkdir(parents=True, exist_ok=True); part = cache.with_suffix('.part')
            torch.save(prepare(entries, rgba[use], vae, encoder, tokenizer, acc.device), part); part.replace(cache)
    ready = torch.load(cache, weights_only=True)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(a.init) if a.init else UNet2DConditionModel(**CONFIG)
    unet = unet.to(memory_format=torch.channels_last); alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
    def loss(model, z, states, t, noise):
        return F.mse_loss(model(noisy(z, noise, t, alphas), t, states).sample.float(), noise)
    def report(model, step):
        n = stage_of(step-1, stages)
        among = torch.tensor([i for i, e in enumerate(entries) if e['thing'] in data.things(n)])
        sheet(draw_prompts(pipeline(vae, encoder, tokenizer, model), prompts()), 8, a.folder/f'sheet-{step:06d}.png')
        if step%(4*a.report_every)==0: model.save_pretrained(a.folder/'unet-on-the-way')
        return f'{n} things; the right caption lowers the loss at {caption_gap(model, ready, alphas, acc.device, among)}'
    fit(unet, drawer(ready, entries, stages, a.batch, a.coloured), loss, acc, steps=stages[-1][1], lr=a.lr, decay=a.decay, ema_decay=.998,
        folder=a.folder, report=report, report_every=a.report_every, save_every=a.report_every)
    if acc.is_main_process:
        unet.save_pretrained(a.folder/'unet')
        (a.folder/'record.json').write_text(json.dumps(dict(stages=stages, batch=a.batch, pictures_seen=stages[-1][1]*a.batch, pictures=len(entries)), indent=1))

if __name__=='__main__': main()
