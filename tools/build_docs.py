"""Build the site into _docs/ with no Quarto and no network: nbdev processes the notebooks, smalldocs renders them."""
import json, os, re, shutil, sys, warnings
from pathlib import Path

from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev import serve, showdoc
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from finish import readable
from pages import Description, Steps, index_all
from sd_deepdive._modidx import d
from smalldocs import layout
from smalldocs.config import BuildError, load
from smalldocs.site import Site

ROOT = Path(__file__).parents[1]
VERSIONS = ['torch', 'diffusers', 'transformers', 'numpy', 'matplotlib']
WEB_FONTS = re.compile(r'@import\s*url\(["\']?https?:[^)]*\)[^;]*;')


class OfflineSite(Site):
    "smalldocs' site: pages named as nbdev links them, lessons numbered as the text does, and every file it needs in `site_libs`."
    def read(self, src):
        page = super().read(src)
        page.out = page.out.with_name(page.front.get('output-file', page.out.name))
        if number := re.match(r'(?!00)\d\d(?=_)', src.name): page.front['title'] = f'{number[0]} {page.front["title"]}'
        return page

    def find_page(self, target):
        return super().find_page(target) or next((p for p in self.pages.values() if p.out == target), None)

    def resolve(self, href, page, record=True):
        base = self.project.website['site-url'].rstrip('/') + '/'
        return super().resolve('/' + href.removeprefix(base) if href.startswith(base) else href, page, record)


def badges(cfg, name):
    "Markdown for the Colab and Kaggle badges of notebook `name`."
    path = f'{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{cfg.nbs_path.name}/{name}'
    return (f'::: {{.lesson-badges}}\n[![Open in Colab](images/colab.svg)](https://colab.research.google.com/github/{path}) '
            f'[![Open in Kaggle](images/kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/{path})\n:::')


def facts(cfg, nb, name):
    "How long a lesson takes to read (200 words, 12 lines of code a minute) and to run (as `make times` recorded it)."
    words = sum(len(c.source.split()) for c in nb.cells if c.cell_type == 'markdown')
    code = [c.source for c in nb.cells if c.cell_type == 'code' and '#| code-fold: true' not in c.source]
    lines = sum(bool(line.strip()) for source in code for line in source.splitlines())
    seconds = json.loads((ROOT/'tools/times.json').read_text()).get(name)
    runs = '' if seconds is None else f' · runs in {max(1, round(seconds))} s on one core'
    return f'<p class="lesson-facts">Reading time about {round(words/200 + lines/12)} min{runs}</p>'


def versions():
    "With which versions the outputs were saved."
    locked = dict(line.split('==') for line in (ROOT/'lock.txt').read_text().split() if '==' in line)
    return '<p class="lesson-versions">Outputs saved with ' + ', '.join(f'{name} {locked[name]}' for name in VERSIONS) + '.</p>'


def process(cfg):
    "Process the notebooks as nbdev does, with the steps of pages.py; to each lesson badges, times and versions are added. Returns their folder."
    refresh_quarto_yml()
    index_all(d, [file for file in cfg.lib_path.rglob('*.py') if file.name[0] != '_'], ROOT, cfg.nbs_path)
    serve.FilterDefaults, showdoc.BasicMarkdownRenderer = Steps, Description
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Found cells containing imports')
        folder = serve.proc_nbs(n_workers=0, force=True)
    for p in folder.glob('[0-9]*.ipynb'):
        nb = read_nb(p)
        nb.cells.insert(1, mk_cell(badges(cfg, p.name) + '\n\n' + facts(cfg, nb, p.name), 'markdown'))
        nb.cells.append(mk_cell(versions(), 'markdown'))
        write_nb(nb, p)
    return folder


def check_notebooks(folder):
    "Exit with a line for a notebook that cannot be read."
    for file in sorted(folder.glob('*.ipynb')):
        try: read_nb(file)
        except Exception as e: sys.exit(f'{file} is no whole notebook ({type(e).__name__}: {e}). Remove it, or get it again: git checkout {file}')


def take_place(new, place):
    "Put a new folder where there may be one, in two moves."
    old = place.with_name(f'{place.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if place.exists(): place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def main():
    "Build the site beside the one that may be there, and put it in its place; exit with a line for each broken link."
    os.chdir(ROOT)
    cfg = get_config()
    check_notebooks(cfg.nbs_path)
    layout.KATEX = 'site_libs/katex'
    site = OfflineSite(load(process(cfg)), quiet=True)
    site.out = cfg.doc_path
    site.check_output()
    site.out = cfg.doc_path.with_name(f'{cfg.doc_path.name}.new')
    shutil.rmtree(site.out, ignore_errors=True)
    n = site.build()
    libs = site.out/'site_libs'
    shutil.copytree(ROOT/'vendor/katex', libs/'katex')
    for page in site.out.glob('*.html'): page.write_text(readable(page.read_text()))
    for css in libs.rglob('*.css'): css.write_text(WEB_FONTS.sub('', css.read_text()))
    for copy in site.out.glob('*.llms.md'): shutil.copy(copy, copy.with_name(copy.name.replace('.llms.md', '.html.md')))   # where modules link to
    take_place(site.out, cfg.doc_path)
    if site.broken: sys.exit('\n'.join(f'{page}: broken link {href}' for page, href in site.broken))
    print(f'{n} pages in {cfg.doc_path}')


if __name__ == '__main__':
    try: main()
    except BuildError as e: sys.exit(f'{e}. Where it is what a build left, make clean removes it.')
    except KeyboardInterrupt: sys.exit('Stopped; a site that was there is whole.')
