"""The autoencoder: 3 x 128 x 128 -> 4 x 16 x 16 and back. First on crops (four times as many in the same time), then on whole
pictures. Run: `make train-autoencoder`."""
import argparse, json
from pathlib import Path
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from . import data
from .fit import accelerator, fit
from .show import sheet

CONFIG = dict(in_channels=3, out_channels=3, latent_channels=4, sample_size=data.SIZE, block_out_channels=(16, 32, 64, 96),
              layers_per_block=1, norm_num_groups=8, down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4)
FOLDER = data.WORK/'autoencoder'

class RoundTrip(nn.Module):
    "Encode, sample, decode in one call, so that several processes average all gradients."
    def __init__(self, vae): super().__init__(); self.vae = vae
    def forward(self, pixels, noise):
        posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.mean + posterior.std*noise).sample.float(), posterior.mean.float(), posterior.logvar.float()

def edges(x):
    "Differences between neighbours, down and to the right."
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]

def reconstruction_loss(y, x):
    "L1 + L2 + the L1 distance of the edges, at full and at half size."
    half = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)
    sharp = sum((a-b).abs().mean() for u, v in ((y, x), half) for a, b in zip(edges(u), edges(v)))
    return (y-x).abs().mean() + (y-x).pow(2).mean() + sharp/2

def loss(model, rgba, colour, matrix, noise, kl_weight=5e-4):
    size = noise.shape[-1]*8
    pixels = data.compose(rgba, colour, matrix, size).contiguous(memory_format=torch.channels_last)
    y, mean, logvar = model(pixels, noise)
    return reconstruction_loss(y, pixels) + kl_weight*(mean.pow(2) + logvar.exp() - 1 - logvar).mean()/2

def drawer(rgba, crop_steps, crop_batch, batch):
    "Crops of half the side for the first `crop_steps` steps, whole pictures after that; half of the backgrounds are white."
    palette = data.palette()
    def draw(g, step):
        n, size = (crop_batch, data.SIZE//2) if step<crop_steps else (batch, data.SIZE)
        pick = torch.randint(len(palette), (n,), generator=g)*(torch.rand(n, generator=g)<.5)
        colour = (palette[pick] + (torch.rand(n, 3, generator=g)*2-1)*.04*(pick>0)[:, None]).clamp(0, 1)
        crop = step<crop_steps
        matrix = data.affine(g, n, zoom=(1.7, 2.3) if crop else (.8, 1.1), turn=.15, shift=.5 if crop else .05, flip=True)
        return dict(rgba=rgba[torch.randint(len(rgba), (n,), generator=g)], colour=colour, matrix=matrix,
                    noise=torch.randn(n, 4, size//8, size//8, generator=g))
    return draw

def psnr(y, x): return -10*((y.clamp(-1, 1)-x)/2).pow(2).mean((1, 2, 3)).log10()

def round_trips(vae, pixels): return torch.cat([vae.decode(vae.encode(p).latent_dist.mode()).sample for p in pixels.split(20)])

def measure_latents(vae, pixels):
    "Standard deviation of the latents over pictures: its inverse is the scaling factor."
    return torch.cat([vae.encode(p).latent_dist.sample(torch.Generator().manual_seed(0)) for p in pixels.split(20)]).std().item()

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--crop-steps', type=int, default=3900); p.add_argument('--crop-batch', type=int, default=16)
    p.add_argument('--steps', type=int, default=800, help='steps on whole pictures'); p.add_argument('--batch', type=int, default=8)
    p.add_argument('--lr', type=float, default=1.5e-3); p.add_argument('--precision', default='bf16', choices=['no', 'bf16'])
    p.add_argument('--decay', type=float, default=.4); p.add_argument('--folder', type=Path, default=FOLDER)
    a = p.parse_args(); acc = accelerator(a.precision)
    entries, rgba = data.unpack()
    keep = [i for i, e in enumerate(entries) if e['style'] in data.STYLES and not data.is_held_out(e)]
    held = [i for i, e in enumerate(entries) if data.is_held_out(e)]
    torch.manual_seed(0)
    model = RoundTrip(AutoencoderKL(**CONFIG)).to(memory_format=torch.channels_last)
    white = torch.ones(1, 3)
    test = data.compose(rgba[held], white.expand(len(held), 3)).to(acc.device)
    def report(model, step):
        y = round_trips(model.vae, test); sheet(torch.stack([test[:16], y[:16]], 1).flatten(0, 1), 8, a.folder/'round_trip.png')
        return f'PSNR on {len(held)} held-out pictures {psnr(y, test).mean():.2f} dB, latents deviate by {measure_latents(model.vae, test):.3f}'
    steps = a.crop_steps + a.steps
    fit(model, drawer(rgba[keep], a.crop_steps, a.crop_batch, a.batch), loss, acc, steps=steps, lr=a.lr, decay=a.decay,
        folder=a.folder, report=report, report_every=300, save_every=300)
    if acc.is_main_process:
        with torch.no_grad():
            sample = data.compose(rgba[keep[::20]], white.expand(len(keep[::20]), 3)).to(acc.device)
            model.vae.register_to_config(scaling_factor=round(1/measure_latents(model.vae, sample), 5))
            quality = psnr(round_trips(model.vae, test), test)
        model.vae.save_pretrained(a.folder/'vae')
        (a.folder/'record.json').write_text(json.dumps(dict(steps=steps, pictures=a.crop_steps*a.crop_batch/4 + a.steps*a.batch,
            psnr=round(quality.mean().item(), 2), psnr_min=round(quality.min().item(), 2)), indent=1))

if __name__=='__main__': main()
