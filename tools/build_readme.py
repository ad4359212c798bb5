"""Write README.md from nbs/index.ipynb with no Quarto: its Markdown, code and saved outputs, links made right for GitHub."""
import base64, os, re, shutil
from pathlib import Path

from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html
from sd_deepdive.checks import whole_file
from smalldocs.markdown import split_front_matter
from smalldocs.notebook import cell_options

ROOT = Path(__file__).parents[1]


def text(v):
    "A notebook's text, which may be stored as a list of lines."
    return ''.join(v) if isinstance(v, list) else v


def link(target, cfg):
    "Where a link or picture of the index notebook lies as seen from the top folder: a lesson on the site, a file in the repository."
    if re.match(r'[a-z]+:|[#/]', target): return target
    path, hash, anchor = target.partition('#')
    if path.endswith('.ipynb'): return f'{cfg.doc_url.rstrip("/")}/{nbpath2html(path)}{hash}{anchor}'
    return os.path.relpath(os.path.normpath(cfg.nbs_path/path), cfg.config_path) + hash + anchor


def output(out, alt, files):
    "One saved output as Markdown; a picture is written into the folder `files`."
    data = out.get('data', {})
    if 'image/png' in data:
        files.mkdir(exist_ok=True)
        file = files/f'figure-{len(list(files.iterdir())) + 1}.png'
        file.write_bytes(base64.b64decode(text(data['image/png'])))
        return f'![{alt}]({files.name}/{file.name})'
    if 'text/markdown' in data: return text(data['text/markdown'])
    return '\n'.join('    ' + line for line in text(data.get('text/plain', out.get('text', ''))).rstrip().splitlines())


def readme(cfg, folder):
    "The README as text; its pictures are written into `folder`."
    files, parts, cells = folder/'index_files', [], read_nb(cfg.nbs_path/cfg.readme_nb).cells
    shutil.rmtree(files, ignore_errors=True)
    for cell in cells:
        if cell.cell_type == 'raw':
            front, _ = split_front_matter(cell.source)
            parts += [f'# {front["title"]}', f'> {front["description"]}']
        elif cell.cell_type == 'markdown':
            parts.append(re.sub(r'(?<=\]\()([^)\s]+)(?=\))', lambda m: link(m[1], cfg), cell.source))
        else:
            opts, code = cell_options(cell.source)
            if opts.get('include') is False or 'hide' in cell.directives: continue
            if code and opts.get('echo') is not False: parts.append(f'```python\n{code.strip()}\n```')
            if opts.get('output') is not False: parts += [output(o, opts.get('fig-alt', ''), files) for o in cell.get('outputs', [])]
    return '\n\n'.join(p for p in parts if p.strip()) + '\n'


def main():
    "Write README.md and its pictures."
    os.chdir(ROOT)
    cfg = get_config()
    made = readme(cfg, ROOT)
    with whole_file(ROOT/'README.md') as part: part.write_text(made)


if __name__ == '__main__': main()
