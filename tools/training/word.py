"""A new word for the embedded model: one row of the token table, trained on five pictures that no network has seen; everything else
stays as it is. Gal et al. 2022, arXiv:2208.01618. Run: `make train-word`."""
import argparse, math
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from sd_deepdive.drawings import drawings
from sd_deepdive.images import on_colour
from sd_deepdive.latents import pil2latent
from sd_deepdive.parts import Parts, load_parts
from sd_deepdive.sampling import make_samples
from sd_deepdive.schedule import add_noise
from sd_deepdive.text import text_enc
from sd_deepdive.words import add_words, course_words, save_words, word_vector
from .fit import accelerator, step_generator
from .data import WORK
from .show import sheet

TOKEN, START, COLOUR = '<lagoon>', 'blue', '#40c8be'     # the word, the known word that it starts from, what it shall mean
THINGS = (('red apple', 'blob'), ('pizza', '3d'), ('umbrella', 'noto'), ('sunflower', 'twemoji'), ('guitar', 'twemoji'))
SHOWN = ('octopus, 3d style', 'strawberry, flat style', 'house, twemoji style', 'tree, noto style', 'rocket, 3d style', 'panda, noto style')

def train_word(
    parts: Parts,          # its tokenizer knows the token already; nothing but one row of its token table changes
    token: str,
    latents: Tensor,       # (N, 4, h, w), scaled: the pictures
    captions: list[str],   # (N,), each with the token in it
    steps: int,
    batch: int = 8,
    lr: float = .01,       # Adam's rate, falling to 0 along a line
    seed: int = 0,
) -> Tensor:
    "The vector (D,) with which the UNet best predicts the noise in the pictures. Gal et al. 2022, arXiv:2208.01618, eq. 2."
    for part in (parts.text_encoder, parts.unet): part.requires_grad_(False)
    table, new = parts.text_encoder.get_input_embeddings(), parts.tokenizer.convert_tokens_to_ids(token)
    ids = parts.tokenizer(captions, padding='max_length', truncation=True, return_tensors='pt').input_ids.to(parts.device)
    vector = torch.nn.Parameter(table.weight[new].detach().clone())
    optimizer, abar = torch.optim.Adam([vector], lr), parts.scheduler.alphas_cumprod.to(parts.device)
    hook = table.register_forward_hook(lambda table, i, rows: torch.where((i[0]==new)[..., None], vector, rows))
    bar = tqdm(range(steps), desc=token, mininterval=5)
    for step in bar:
        g = step_generator(seed, step)
        pick, t = (torch.randint(n, (batch,), generator=g) for n in (len(latents), len(abar)))
        noise = torch.randn(batch, *latents.shape[1:], generator=g).to(parts.device)
        x_t = add_noise(latents[pick], noise, abar[t].view(-1, 1, 1, 1))
        text = parts.text_encoder(ids[pick]).last_hidden_state
        loss = F.mse_loss(parts.unet(x_t, t.to(parts.device), text).sample, noise)
        if not math.isfinite(loss.item()): raise FloatingPointError(f'The loss is {loss.item()} at step {step}. Lower lr.')
        optimizer.param_groups[0]['lr'] = lr*(1 - step/steps)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        bar.set_postfix(loss=f'{loss.item():.4f}', refresh=False)
    hook.remove()
    with torch.no_grad(): table.weight[new] = vector
    return vector.detach()

@torch.no_grad()
def noise_loss(parts: Parts, latents: Tensor, captions: list[str], times=range(20, 1000, 40)) -> float:
    "The mean squared error of the predicted noise over times, with the same noise for whatever the captions say."
    z, text, abar = torch.cat([latents]*len(times)), torch.cat([text_enc(parts, captions)]*len(times)), parts.scheduler.alphas_cumprod.to(parts.device)
    t = torch.tensor(times, device=parts.device).repeat_interleave(len(latents))
    noise = torch.randn(z.shape, generator=step_generator(1, 0)).to(parts.device)
    x_t = add_noise(z, noise, abar[t].view(-1, 1, 1, 1))
    return F.mse_loss(torch.cat([parts.unet(*part).sample for part in zip(x_t.split(8), t.split(8), text.split(8))]), noise).item()

def examples() -> tuple[list, list[str]]:
    "The five drawings on the new colour, and their captions."
    found = [drawings(thing, style)[0] for thing, style in THINGS]
    return [on_colour(d.image, COLOUR) for d in found], [f'{d.caption}, on a {TOKEN} background' for d in found]

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--steps', type=int, default=200); p.add_argument('--lr', type=float, default=.01); p.add_argument('--batch', type=int, default=8)
    p.add_argument('--file', type=Path, default=course_words()); a = p.parse_args()
    accelerator()       # as many threads as OMP_NUM_THREADS says
    parts = load_parts(dtype=torch.float32); add_words(parts, {TOKEN: word_vector(parts, START)})
    images, captions = examples(); latents = pil2latent(parts, images)
    loss = {word: noise_loss(parts, latents, [c.replace(TOKEN, word) for c in captions]) for word in ('blue', 'green', 'turquoise')}
    vector = train_word(parts, TOKEN, latents, captions, a.steps, a.batch, a.lr); loss[TOKEN] = noise_loss(parts, latents, captions)
    about = (f'{a.steps} steps of {a.batch} at lr {a.lr} from {START!r}, on five held-out drawings on {COLOUR}: ' +
             '; '.join(f'"{c}"' for c in captions) + '. For the embedded model.')
    save_words(a.file, {TOKEN: vector}, dict(about=about))      # one entry: safetensors writes several in any order
    print(f'{a.file.name}: {TOKEN}, loss ' + ', '.join(f'{l:.4f} with {word}' for word, l in loss.items()))
    drawn = [f'{thing}, on a {word} background' for word in ('turquoise', START, TOKEN) for thing in SHOWN]
    sheet(make_samples(parts, drawn, seed=[*range(len(SHOWN))]*3), len(SHOWN), WORK/'word'/'sheet.png')

if __name__=='__main__': main()
