"""Pictures and captions from the package registries: fetch, check, rasterise, name, pack into one zip. Run: `make data`."""
import base64, hashlib, io, json, random, re, shutil, subprocess, sys, tarfile, tomllib, unicodedata, zipfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT/'artifacts'                  # everything that is made on the way; not tracked
PICTURES = WORK/'pictures.zip'
HELD_OUT = HERE/'held_out.json'          # committed before the first training
STYLES = ('noto', 'twemoji', 'flat', '3d', 'blob')   # the styles the model is trained on
SIZE, MARGIN = 128, 9                    # pixels: side of a picture, empty border around the drawing
GROUPS = {0, 3, 4, 5, 6, 7, 8}           # emojibase groups: no people, no flags
COLOURS = dict(white=(255,255,255), black=(20,20,20), gray=(150,150,150), red=(220,50,50), orange=(245,150,50),
               yellow=(250,220,80), green=(80,180,90), blue=(70,130,230), purple=(140,80,190), pink=(250,160,200))

# Fetching --------------------------------------------------------------------------------------------------------

def fetch(package: str, version: str, integrity: str, **_) -> Path:
    "One package from its registry through the registry's own client (npm, or pip for a wheel), its checksum compared."
    folder = WORK/'packages'/f'{package}-{version}'.replace('/', '-'); folder.mkdir(parents=True, exist_ok=True)
    kind, _, digest = integrity.partition('-')
    if not list(folder.glob('*')):
        client = (['npm', 'pack', '--silent', '--pack-destination', str(folder), f'{package}@{version}'] if kind=='sha512' else
                  [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', str(folder), f'{package}=={version}'])
        if not shutil.which(client[0]): raise FileNotFoundError(f'{client[0]} is not installed: it fetches {package} from its registry.')
        subprocess.run(client, check=True, stdout=subprocess.DEVNULL)
    file = next(folder.glob('*'))
    found = hashlib.new(kind, file.read_bytes())
    if digest not in (found.hexdigest(), base64.b64encode(found.digest()).decode()):
        file.unlink()
        raise ValueError(f'{package} {version}: the checksum is not the recorded {integrity}. The file was removed; run again.')
    return file

def member(archive: Path, path: str) -> bytes:
    "One file of an npm package."
    with tarfile.open(archive) as tar: return tar.extractfile(f'package/{path}').read()

# Names -----------------------------------------------------------------------------------------------------------

def slug(name): return re.sub('[^a-z0-9]', '', unicodedata.normalize('NFKD', name).encode('ascii', 'ignore').decode().lower())
def plain(code): return code.lower().replace('-fe0f', '')
def clean(text):
    "Lower-case ASCII words, as the captions use them."
    text = unicodedata.normalize('NFKD', text.replace('’', "'")).encode('ascii', 'ignore').decode().lower()
    return re.sub(r'\s+', ' ', re.sub(r'[:()]', ' ', text)).strip().replace('deciduous tree', 'tree')

def emoji_table(archive: Path) -> list[dict]:
    "code point, name and keywords of every emoji that the course uses."
    table = [e for e in json.loads(member(archive, 'en/data.json')) if e.get('group') in GROUPS]
    return [dict(code=plain(e['hexcode']), thing=clean(e['label']), keywords=sorted({clean(t) for t in e.get('tags', [])} - {''}),
                 slug=slug(e['label'])) for e in table if "o'clock" not in clean(e['label']) and '-thirty' not in e['label']]

# Drawing ---------------------------------------------------------------------------------------------------------

def drawings(source: dict, table: list[dict]):
    "(emoji, SVG text or encoded picture) for each emoji that this set draws; an icon is found by code point, else by name."
    archive, by_code, by_slug, seen = fetch(**source), {e['code']: e for e in table}, {e['slug']: e for e in table}, set()
    if source['style']=='3d':
        with tarfile.open(archive) as tar:
            for m in tar.getmembers():
                e = by_code.get(plain(Path(m.name).stem))
                if e is None or e['code'] in seen or not m.name.endswith('.webp'): continue
                seen.add(e['code']); yield e, tar.extractfile(m).read()
        return
    icons, chars = json.loads(member(archive, 'icons.json')), json.loads(member(archive, 'chars.json'))
    code_of = {name: plain(code) for code, name in chars.items()}
    for name, icon in icons['icons'].items():
        e = by_code.get(code_of.get(name)) or by_slug.get(slug(name))
        if e is None or e['code'] in seen: continue
        seen.add(e['code'])
        w, h = (icon.get(k, icons.get(k, 16)) for k in ('width', 'height'))
        box = f'{icon.get("left", 0)} {icon.get("top", 0)} {w} {h}'
        yield e, (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
                  f'width="{2*SIZE}" height="{2*SIZE}">{icon["body"]}</svg>')

def rasterise(drawing: str | bytes) -> bytes | None:
    "SVG text or an encoded picture -> lossless WebP, RGBA, SIZE x SIZE, cropped to what is drawn and centred; None if empty."
    import resvg_py
    data = bytes(resvg_py.svg_to_bytes(svg_string=drawing)) if isinstance(drawing, str) else drawing
    picture = Image.open(io.BytesIO(data)).convert('RGBA')
    box = picture.getchannel('A').point(lambda a: 255*(a>8)).getbbox()
    if box is None: return None
    picture = picture.crop(box); scale = (SIZE-2*MARGIN)/max(picture.size)
    picture = picture.resize([max(1, round(s*scale)) for s in picture.size], Image.LANCZOS)
    page = Image.new('RGBA', (SIZE, SIZE)); page.paste(picture, [(SIZE-s)//2 for s in picture.size])
    out = io.BytesIO(); page.save(out, 'webp', lossless=True); return out.getvalue()

# The packed set --------------------------------------------------------------------------------------------------

def pack(entries: list[dict], pictures: list[bytes], path: Path):
    "Write the zip of pictures with its list `metadata.jsonl`, atomically."
    path.parent.mkdir(parents=True, exist_ok=True); part = path.with_suffix('.part')
    with zipfile.ZipFile(part, 'w') as z:
        for e, p in zip(entries, pictures): z.writestr(zipfile.ZipInfo(e['file_name']), p)
        z.writestr(zipfile.ZipInfo('metadata.jsonl'), '\n'.join(map(json.dumps, entries)))
    part.replace(path)

def unpack(path: Path = PICTURES) -> tuple[list[dict], torch.Tensor]:
    "The entries (style, thing, keywords, file_name) and the pictures: uint8 (N,4,SIZE,SIZE), RGB premultiplied by alpha."
    if not Path(path).exists(): raise FileNotFoundError(f'{path} is not there: `make data` builds it.')
    with zipfile.ZipFile(path) as z:
        entries = [json.loads(l) for l in z.read('metadata.jsonl').decode().splitlines()]
        pictures = [np.asarray(Image.open(io.BytesIO(z.read(e['file_name']))).convert('RGBA').convert('RGBa')) for e in entries]
    return entries, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

@cache
def things(n: int = 100) -> tuple[str, ...]:
    "The first `n` things that the model learns to draw; the order is the order of the stages of training."
    names = (HERE/'things.txt').read_text().split('\n')[:-1]
    if n>len(names): raise ValueError(f'things={n}: things.txt lists {len(names)}. Add names to it, or ask for fewer.')
    return tuple(names[:n])

@cache
def held_out() -> frozenset[tuple[str, str]]:
    "The (thing, style) pairs that no network is trained on."
    return frozenset(tuple(p) for group in json.loads(HELD_OUT.read_text()).values() for p in group)

def is_held_out(entry: dict) -> bool: return (entry['thing'], entry['style']) in held_out()

def choose_held_out(entries: list[dict], seed: int = 0) -> dict:
    """Pairs to hold out: of the things to be drawn 10 in each style, no thing twice, but for five that are held out both flat and
    in 3d (the two sets share their outlines); and 60 pictures of other things, for the autoencoder."""
    rng = random.Random(seed); names = rng.sample(things(), len(things())); n = 10
    drawn = [(t, s) for i, s in enumerate(STYLES) for t in names[i*n:(i+1)*n]]
    drawn += [(t, '3d') for t in names[STYLES.index('flat')*n:][:5]]
    others = sorted({(e['thing'], e['style']) for e in entries if e['thing'] not in things() and e['style'] in STYLES})
    return dict(drawn=sorted(drawn), others=sorted(rng.sample(others, 60)))

# Captions --------------------------------------------------------------------------------------------------------

def article(thing: str) -> str: return f'an {thing}' if thing[0] in 'aeiou' else f'a {thing}'

def caption(entry: dict, colour: str, rng: random.Random) -> str:
    "One of the ways to name a picture: thing, style, now and then keywords, and the background where it is not white."
    thing, style, keywords = entry['thing'], entry['style'], entry['keywords']
    ways = {f'{thing}, {style} style': 40, f'{article(thing)}, {style} style': 20, f'{article(thing)}': 8, thing: 4,
            f'a {style} emoji of {article(thing)}': 10, f'{style} style, {thing}': 6}
    if keywords: ways[f'{thing}, {rng.choice(keywords)}, {style} style'] = 12
    words = rng.choices(list(ways), list(ways.values()))[0]
    return words if colour=='white' and rng.random()<.85 else f'{words}, on {article(colour)} background'

# Pictures as tensors ---------------------------------------------------------------------------------------------

def compose(rgba: torch.Tensor, colour: torch.Tensor, matrix: torch.Tensor | None = None, size: int = SIZE) -> torch.Tensor:
    "Lay premultiplied uint8 (B,4,H,W) on colours (B,3) in 0..1, moved by affine matrices (B,2,3); float (B,3,size,size) in -1..1."
    x = rgba.float()/255
    if matrix is not None:
        grid = F.affine_grid(matrix, (len(x), 4, size, size), align_corners=False)
        x = F.grid_sample(x, grid, mode='bilinear', align_corners=False)
    return (x[:, :3] + colour[:, :, None, None]*(1-x[:, 3:]))*2 - 1

def palette() -> torch.Tensor: return torch.tensor(list(COLOURS.values()))/255

def affine(generator: torch.Generator, n: int, zoom=(.9, 1.1), turn=0., shift=0., flip=False) -> torch.Tensor:
    "Random affine matrices (n,2,3): zoom factor, angle in radians, shift in half-widths."
    u = lambda *s: torch.rand(n, *s, generator=generator)*2 - 1
    scale, angle = (zoom[0] + (zoom[1]-zoom[0])*(u()+1)/2).reciprocal(), u()*turn
    mirror = torch.where(u()<0, -1., 1.) if flip else torch.ones(n)
    rows = torch.stack([scale*mirror*angle.cos(), -scale*angle.sin(), scale*mirror*angle.sin(), scale*angle.cos()], 1).view(n, 2, 2)
    return torch.cat([rows, u(2, 1)*shift], 2)

# -----------------------------------------------------------------------------------------------------------------

def main():
    sources = tomllib.loads((HERE/'sources.toml').read_text())
    table = emoji_table(fetch(**sources['names']))
    jobs = [(dict(style=s['style'], thing=e['thing'], keywords=e['keywords'], file_name=f'{s["style"]}/{e["code"]}.webp'), d)
            for s in sources['pictures'] for e, d in drawings(s, table)]
    with ProcessPoolExecutor() as pool:
        pictures = list(tqdm(pool.map(rasterise, [d for _, d in jobs], chunksize=32), total=len(jobs), desc='drawing'))
    kept = [(e, p) for (e, _), p in zip(jobs, pictures) if p]
    entries = [e for e, _ in kept]; pack(entries, [p for _, p in kept], PICTURES)
    fetch(**sources['tokenizer'])
    if not HELD_OUT.exists(): HELD_OUT.write_text(json.dumps(choose_held_out(entries), indent=1) + '\n')
    count = {s['style']: sum(e['style']==s['style'] for e in entries) for s in sources['pictures']}
    missing = [(t, s) for t in things() for s in STYLES if not any(e['thing']==t and e['style']==s for e in entries)]
    if missing: raise ValueError(f'things.txt names things that a set does not draw: {missing}')
    print(f'{len(entries)} pictures of {len({e["thing"] for e in entries})} things in {PICTURES.relative_to(ROOT)}, '
          f'{PICTURES.stat().st_size/1e6:.1f} MB: {count}')

if __name__=='__main__': main()
