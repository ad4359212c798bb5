"""The model card, from its template and the records of training. Run: `make card`, after `make quality`."""
import json
from pathlib import Path
from string import Template

from fastcore.script import call_parse

from sd_deepdive.checks import whole_file
from sd_deepdive.drawings import read_drawings
from sd_deepdive.places import embedded_folder
from sd_deepdive.training.data import styles, things
from sd_deepdive.training.sources import held_out_pairs, sources


def table(header, rows): return '\n'.join(['| ' + ' | '.join(map(str, r)) + ' |' for r in (header, ['---']*len(header), *rows)])


def card(folder: Path) -> str:
    "The model card, filled in from what training recorded, and `make quality`, if it measured this model and not one before it."
    read = lambda name: json.loads((folder/name).read_text()) if (folder/name).exists() else {}
    made = lambda name: (folder/name).stat().st_mtime if (folder/name).exists() else 0
    drawn = [d.style for d in read_drawings(folder/'pictures.zip')]
    taught = things(max(n for n, _ in read('diffusion/record.json')['stages']))
    packages = table(['what', 'package', 'author', 'licence', 'source', 'pictures'],
        [[f'{s["style"]} style' + (' (kept back)' if s.get('kept_back') else ''), f'{s["package"]} {s["version"]}', s['author'], s['license'], s['source'],
          drawn.count(s['style'])] for s in sources()['pictures']] +
        [[k, f'{v["package"]} {v["version"]}', v['author'], v['license'], v['source'], ''] for k, v in sources().items() if k != 'pictures'])
    held = {s: sorted(t for t, style in held_out_pairs() if style == s and t in taught) for s in styles()}
    quality = read('quality.json') if made('quality.json') > made('diffusion/record.json') else {}
    rows = [[f'{pairs}, {row}', f'{thing:.0%}', f'{style:.0%}'] for pairs, measured in quality.items() if isinstance(measured, list) for row, thing, style in measured]
    return Template((Path(__file__).with_name('model_card.md')).read_text()).substitute(
        sources=packages, things=', '.join(taught), count=len(taught), styles=', '.join(styles()), held_out=table(['style', 'things'], [[s, ', '.join(t)] for s, t in held.items()]),
        held_out_count=sum(map(len, held.values())), held_out_all=len(held_out_pairs()), quality=table(['', 'thing', 'style'], rows) if rows else '(not measured yet)',
        both=len({*held['flat']} & {*held['3d']}), psnr=f'{quality["psnr"]:.1f} dB' if quality else '(not measured yet)', autoencoder=json.dumps(read('autoencoder/record.json')), text=json.dumps(read('text/record.json')),
        diffusion=json.dumps(read('diffusion/record.json')))


@call_parse
def main(
    folder: Path = Path('artifacts'),   # of training
):
    "Write the card of the embedded model."
    file = embedded_folder()/'README.md'
    text = card(Path(folder))
    with whole_file(file) as part: part.write_text(text)
    print(f'{file} is written.')
