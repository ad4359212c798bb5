"""Text meets pictures: the text encoder, trained as CLIP's was, against a small picture tower; later it is frozen. With `--judge`
the same with another seed and on all pictures: a judge for `quality.py` that is not the teacher. Run: `make train-text`."""
import argparse, json, math, random
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel
from . import data
from .fit import accelerator, fit
from .tokenizer import save_tokenizer

WIDTH, SIDE = 128, 64      # channels of the text states and of the shared space; side of the pictures that the tower sees
TEXT = dict(vocab_size=49408, hidden_size=WIDTH, intermediate_size=4*WIDTH, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=77, hidden_act='quick_gelu', projection_dim=WIDTH, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
FOLDER, JUDGE = data.WORK/'text', data.WORK/'judge'

class Block(nn.Module):
    "Two convolutions beside an identity."
    def __init__(self, n):
        super().__init__()
        half = lambda: nn.Sequential(nn.GroupNorm(8, n), nn.SiLU(), nn.Conv2d(n, n, 3, padding=1))
        self.body = nn.Sequential(half(), half())
    def forward(self, x): return x + self.body(x)

class PictureTower(nn.Module):
    "Pictures (B,3,SIDE,SIDE) in -1..1 -> vectors (B,width). Four times: halve the side, then a block; then one linear map."
    def __init__(self, width=WIDTH, channels=(24, 48, 96, 144)):
        super().__init__()
        steps = [nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), Block(b)) for a, b in zip((3, *channels), channels)]
        self.body = nn.Sequential(*steps, nn.GroupNorm(8, channels[-1]), nn.SiLU(), nn.Flatten())
        self.head = nn.Linear(channels[-1]*(SIDE >> len(channels))**2, width)
    def forward(self, pixels):
        if pixels.shape[-1]!=SIDE: pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode='area')
        return self.head(self.body(pixels))

class Clip(nn.Module):
    "Both towers and the temperature. Radford et al. 2021, arXiv:2103.00020."
    def __init__(self):
        super().__init__()
        self.text, self.picture = CLIPTextModel(CLIPTextConfig(**TEXT)), PictureTower()
        self.text_projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(14.)))
    def embed_text(self, ids): return F.normalize(self.text_projection(self.text(ids).pooler_output), dim=-1)
    def embed_picture(self, pixels): return F.normalize(self.picture(pixels), dim=-1)
    def forward(self, ids, pixels): return self.logit_scale.exp().clamp(max=100)*self.embed_picture(pixels) @ self.embed_text(ids).T

def loss(model, ids, rgba, colour, matrix, blur):
    "Every picture finds its caption in the batch, every caption its picture. Some pictures are blurred: generated ones will be."
    ids = ids[:, :1 + (ids==TEXT['eos_token_id']).int().argmax(1).max()]     # attention is causal: padding after the last end changes nothing
    pixels = data.compose(rgba, colour, matrix, SIDE)
    soft = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    logits, y = model(ids, torch.lerp(pixels, soft, blur[:, None, None, None])), torch.arange(len(ids), device=ids.device)
    return (F.cross_entropy(logits.float(), y) + F.cross_entropy(logits.float().T, y))/2

def tokenize(tokenizer, captions):
    return tokenizer(captions, padding='max_length', truncation=True, return_tensors='pt').input_ids

def drawer(entries, rgba, tokenizer, batch, favour):
    "Pictures without repetition, the things to be drawn `favour` times as often; a caption and a background for each."
    weight = torch.tensor([float(favour) if e['thing'] in data.things() else 1. for e in entries])
    names, palette = list(data.COLOURS), data.palette()
    def draw(g, step):
        rng, pick = random.Random(g.initial_seed()), torch.multinomial(weight, batch, generator=g)
        colour = torch.randint(len(names), (batch,), generator=g)*(torch.rand(batch, generator=g)<.3)
        captions = [data.caption(entries[i], names[c], rng) for i, c in zip(pick.tolist(), colour.tolist())]
        return dict(ids=tokenize(tokenizer, captions), rgba=rgba[pick], colour=palette[colour],
                    matrix=data.affine(g, batch, zoom=(.85, 1.1), turn=.1, shift=.05), blur=torch.rand(batch, generator=g))
    return draw

def zero_unused(text, tokenizer, entries):
    "Set the table's rows of words that no caption uses to zero: they were never trained, and zeros pack to nothing. Returns the words kept."
    words = {w for e in entries for w in (e['thing'], e['style'], *e['keywords'])} | set(data.COLOURS) | {'a an style emoji of on background ,'}
    used = {i for w in words for i in tokenizer(w).input_ids} | {TEXT['bos_token_id'], TEXT['eos_token_id']}
    table = text.get_input_embeddings().weight
    with torch.no_grad(): table[[i for i in range(len(table)) if i not in used]] = 0
    return len(used)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--steps', type=int, default=550); p.add_argument('--batch', type=int, default=256)
    p.add_argument('--lr', type=float, default=1e-3); p.add_argument('--precision', default='no', choices=['no', 'bf16'])
    p.add_argument('--favour', type=float, default=3.); p.add_argument('--judge', action='store_true'); a = p.parse_args()
    folder, seed = (JUDGE, 1) if a.judge else (FOLDER, 0)
    acc = accelerator(a.precision); tokenizer = save_tokenizer(folder/'tokenizer')
    entries, rgba = data.unpack()
    rgba = torch.cat([F.interpolate(r.float(), scale_factor=SIDE/data.SIZE, mode='area').round().byte() for r in rgba.split(500)])
    keep = [i for i, e in enumerate(entries) if e['style'] in data.STYLES and (a.judge or not data.is_held_out(e))]
    drawn = [i for i, e in enumerate(entries) if e['style'] in data.STYLES and e['thing'] in data.things()]
    held = [n for n, i in enumerate(drawn) if data.is_held_out(entries[i])]
    captions = [f'{entries[i]["thing"]}, {entries[i]["style"]} style' for i in drawn]
    def report(model, step):
        pixels = data.compose(rgba[drawn], torch.ones(len(drawn), 3), size=SIDE).to(acc.device)
        best = model(tokenize(tokenizer, captions).to(acc.device), pixels).argmax(1).tolist()
        named = [entries[drawn[b]]['thing']==entries[drawn[n]]['thing'] for n, b in enumerate(best)]
        exact = [b==n for n, b in enumerate(best)]
        rate = lambda hits, only: f'{100*sum(hits[n] for n in only)/len(only):.0f} %'
        return (f'of {len(drawn)} captions, right thing {rate(named, range(len(best)))}, thing and style {rate(exact, range(len(best)))}; '
                f'held-out: {rate(named, held)}, {rate(exact, held)}')
    torch.manual_seed(seed); model = Clip()
    fit(model, drawer([entries[i] for i in keep], rgba[keep], tokenizer, a.batch, a.favour), loss, acc, steps=a.steps, lr=a.lr, seed=seed,
        warmup=30, decay=.5, weight_decay=.05, ema_decay=.98, folder=folder, report=report, report_every=50, save_every=50)
    if acc.is_main_process:
        kept = zero_unused(model.text, tokenizer, [entries[i] for i in keep])
        model.text.save_pretrained(folder/'text_encoder')
        rest = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith('text.')}
        save_file(rest, folder/'picture_tower.safetensors', metadata=dict(side=str(SIDE)))
        (folder/'record.json').write_text(json.dumps(dict(steps=a.steps, pairs=a.steps*a.batch, pictures=len(keep), tokens=kept), indent=1))

if __name__=='__main__': main()
