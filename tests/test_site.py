"""The site, as a reader meets it: in headless Chromium, with no other host to be reached."""
import gzip, re, shutil, sys
from base64 import b64decode
from io import BytesIO
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from conftest import CFG, NBS, ROOT
from fastcore.basics import AttrDict
from fastcore.nbio import mk_cell, read_nb
from nbdev.config import nbpath2html
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

PAGES = [nbpath2html(nb).name for nb in NBS]
LESSONS = [(nb.name, nbpath2html(nb).name) for nb in NBS if nb.name[0].isdigit()]
BROKEN_IMAGES = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 99))"
RAW_FORMULAE = "return document.querySelectorAll('.math:not(:has(.katex)), .katex-error, .katex [mathcolor=\"#cc0000\"]').length"
CUT_OFF = """const scrolls = e => e.id != 'quarto-content' && (getComputedStyle(e).overflowX != 'visible' || scrolls(e.parentElement))
return [...document.querySelectorAll('#quarto-content *')].filter(e => e.getBoundingClientRect().right > innerWidth && !scrolls(e))
       .map(e => e.outerHTML.slice(0, 99))"""
AXE = (ROOT/'vendor/axe/axe.min.js').read_text()
FINDINGS = """const done = arguments[0];
axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations.filter(v => ['serious', 'critical'].includes(v.impact))
   .map(v => v.id + ': ' + v.nodes.slice(0, 3).map(n => n.target + ' ' + n.html.slice(0, 80)).join(' | '))))"""
LOADED = "return performance.getEntriesByType('resource').filter(r => r.initiatorType != 'img').map(r => r.name)"
BRIGHTNESS = r"return getComputedStyle(document.body).backgroundColor.match(/\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765"

sys.path.append(str(ROOT/'tools'))
from build_docs import check_notebooks, take_place  # noqa: E402
from pages import Description, add_links  # noqa: E402

HEAVIEST = {'index.html': .5e6} | {page: 3e6 for _, page in LESSONS}       # bytes
IN_DARK = ['index.html', 'loop.html', 'explore.html', 'samplers_by_hand.html']


def test_takes_its_place(tmp_path):
    "A new site replaces the old one as a whole, whatever an interrupted build had left; and nothing else stays."
    new, place = tmp_path/'_docs.new', tmp_path/'_docs'
    for folder, name in (new, 'new.html'), (place, 'old.html'), (tmp_path/'_docs.old', 'older.html'): folder.mkdir(); (folder/name).touch()
    take_place(new, place)
    assert [f.relative_to(tmp_path).as_posix() for f in sorted(tmp_path.rglob('*'))] == ['_docs', '_docs/new.html']


def test_broken_notebook(tmp_path):
    "A notebook that is cut short is named before anything is built, and what to do."
    shutil.copy(NBS[-1], tmp_path)
    check_notebooks(tmp_path)
    (tmp_path/'cut.ipynb').write_text(NBS[-1].read_text()[:4000])
    with pytest.raises(SystemExit, match=r'cut.ipynb is no whole notebook .* git checkout'): check_notebooks(tmp_path)


def soup(file):
    "A page, parsed."
    return BeautifulSoup(file.read_text(), 'html.parser')


def weight(page, files, pictures):
    "Bytes of a page and of the files that it loads, compressed, with or without its pictures."
    doc = soup(page)
    for img in [] if pictures else doc.select('img'): img['src'] = ''
    return sum(len(gzip.compress(data)) for data in [str(doc).encode(), *(f.read_bytes() for f in files)])


def findings(browser):
    "What axe-core finds on the page that is open: names, contrast, headings, what the keyboard reaches."
    browser.js(AXE)
    return browser.driver.execute_async_script(FINDINGS)


@pytest.mark.parametrize('page', PAGES)
def test_page_opens(browser, site, page):
    """A page says nothing on the console, asks no other host for anything, shows its pictures and formulae, and axe-core finds nothing serious.
    Compressed, as a server sends them, the first page is under 500 KB without its pictures, and a lesson under 3 MB with them."""
    browser.open(page)
    assert browser.driver.find_element(By.CSS_SELECTOR, 'h1.title').text
    assert browser.js(BROKEN_IMAGES) == []
    assert browser.js(RAW_FORMULAE) == 0
    console, outside = browser.log()
    assert console == []
    assert outside == []
    files = [site/urlsplit(url).path.lstrip('/') for url in browser.js(LOADED) if url.startswith(browser.url)]
    assert files and all(f.is_file() for f in files)
    assert page not in HEAVIEST or weight(site/page, files, pictures=page != 'index.html') < HEAVIEST[page]
    assert findings(browser) == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('page', PAGES)
def test_page_fits_a_phone(browser, page, scheme):
    "At a phone's width nothing sticks out or is cut off without scrolling, and the page follows the phone's scheme; axe-core on some in dark."
    browser.open(page, width=360, scheme=scheme)
    assert browser.js('return document.documentElement.scrollWidth') <= 360
    assert browser.js(CUT_OFF) == []
    assert (browser.js(BRIGHTNESS) > .5) == (scheme == 'light')
    assert page not in IN_DARK or scheme == 'light' or findings(browser) == []


def test_on_paper(browser):
    "Printed, a lesson has its title, folded code and solutions open, and neither search, badges nor links to its parts."
    browser.open('loop.html')
    browser.driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': 'print'})
    try:
        for css, there in {'h1.title': True, 'details:not(.contents) > :not(summary)': True, 'details.contents': False, '#quarto-search': False, '.lesson-badges img': False}.items():
            seen = browser.js('return [...document.querySelectorAll(arguments[0])].map(e => e.checkVisibility({contentVisibilityAuto: true}))', css)
            assert seen and set(seen) == {there}, css
    finally: browser.driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': ''})


@pytest.mark.parametrize('width, folded', [(390, True), (1280, False)])
def test_small_screens(browser, width, folded):
    "Code goes on behind its indent and is copied as it was; on a phone the contents are below the title, and wide figures scroll in their own box."
    browser.open('loop.html', width=width)
    code, more, seen = browser.js("""const code = [...document.querySelectorAll('pre.cell-code code')].find(c => c.innerText.startsWith('@torch.no_grad()\\ndef denoise('));
        return [code.innerText, code.parentNode.scrollWidth - code.parentNode.clientWidth, document.querySelector('details.contents').checkVisibility()]""")
    source, = [c for c in read_nb(CFG.nbs_path/'10_loop.ipynb').cells if 'def denoise(' in c.source]
    source.remove_directives()
    assert more <= 0 and seen == folded and code.strip() == source.source.strip()
    browser.open('look_inside.html', width=width)
    wide = browser.js("return [...document.querySelectorAll('img[data-wide]')].map(e => [e.clientWidth, e.parentNode.scrollWidth - e.parentNode.clientWidth])")
    assert wide and all(w > 480 and (more > 0) == folded for w, more in wide), wide


def letters(text): return re.sub(r'\W', '', text)


def test_machine_readable(site):
    "llms.txt lists the pages, and each page has its text in Markdown where the modules say: all of its sections."
    listed = (site/'llms.txt').read_text()
    for page in PAGES:
        assert page.replace('.html', '.llms.md') in listed
        said = letters((site/f'{page}.md').read_text())
        for head in soup(site/page).select('main h2'): assert letters(head.get_text()) in said


@pytest.mark.parametrize('nb, page', LESSONS)
def test_search_finds_lesson(browser, site, nb, page):
    "A lesson's title typed into the search box shows the lesson among the first three: its sister by hand has the title in its own."
    browser.open('index.html')
    title = soup(site/page).select_one('h1.title').text
    browser.driver.find_element(By.CSS_SELECTOR, '#quarto-search input').send_keys(title)
    hits = WebDriverWait(browser.driver, 10).until(lambda d: d.find_elements(By.CSS_SELECTOR, '.smalldocs-search-results a'))
    assert f'/{page}' in [urlsplit(hit.get_attribute('href')).path for hit in hits[:3]]


@pytest.mark.parametrize('nb, page', LESSONS)
def test_lesson_number_and_code(site, nb, page):
    "A lesson has its number in its title and in the sidebar, and shows all that it exports, each box with a name."
    doc = soup(site/page)
    number = '' if nb.startswith('00') else nb[:2] + ' '
    titles = [tag.text.strip() for tag in doc.select(f'h1.title, #quarto-sidebar a:is([href="{page}"], [href="./{page}"])')]
    assert len(titles) > 1 and all(title.startswith(number) for title in titles)
    code = (site/f'{page}.md').read_text()
    for cell in read_nb(CFG.nbs_path/nb).cells:
        if not {'export', 'exports', 'exporti'} & cell.directives.keys() or 'hide' in cell.directives: continue
        cell.remove_directives()
        assert cell.source.strip() in code
    boxes, begin = [box.text for box in doc.select('details.code-fold > summary')], ('The code of ', 'Slow: ', 'With a network: ', 'On a GPU: ', 'How the list is made')
    assert all(box == 'Imports' or box.startswith(begin) or re.fullmatch('[A-Z][A-Z0-9_, ]*', box) for box in boxes), boxes


@pytest.mark.parametrize('nb, page', LESSONS)
def test_description_and_code(site, nb, page):
    "Each description stands before the code that it is of, with nothing else's between; where the code stands open, its signature is not said twice."
    described = []
    for tag in soup(site/page).select('.cell-output-markdown > h3.anchored, details.code-fold > summary'):
        if tag.name == 'h3':
            described.append((tag.text.split('.')[-1].strip('#'), tag.find_next_sibling().name))
        elif tag.text.startswith('The code of '):
            names = tag.text.removeprefix('The code of ').split(', ')
            if 'open' in tag.parent.attrs: assert all(first == 'p' for name, first in described if name in names), names
            described = [(name, first) for name, first in described if name not in names]
            if 'open' in tag.parent.attrs: assert described == [], names
    assert described == []


def of_all(
    n: int,            # how many
    **options: object, # the rest
) -> int:              # a number
    """One sentence that
    goes on.

    Another paragraph."""


@pytest.mark.parametrize('page', PAGES)
def test_signatures_and_figures(site, page):
    "Signatures name types as the source does, without modules; a figure, saved with 200 dots to the inch, says how wide it is shown."
    doc = soup(site/page)
    assert not re.search(r'__main__\.|torch\._C\.|collections\.abc\.', ' '.join(pre.text for pre in doc.select('pre') if pre.text.startswith('def ')))
    for img in doc.select('img[src^="data:image/png;base64,"]'):
        figure = Image.open(BytesIO(b64decode(img['src'].split(',')[1])))
        shown = round(figure.width*.625) if figure.info.get('dpi', (72,))[0] > 150 else None
        assert img.get('width') == (shown and str(shown))


def test_described_in_order(site):
    "What one cell defines is described in its order, and its code follows."
    parts = [e.text.split('\n')[0] for e in soup(site/'samplers_by_hand.html').select('main h3, main summary')]
    code = next(k for k, part in enumerate(parts) if part.startswith('The code of ') and part.count(',') > 1)
    names = parts[code].removeprefix('The code of ').split(', ')
    assert [part.split('.')[-1] for part in parts[code - len(names):code]] == names


def test_description():
    "The first paragraph of a description is in italics to its end, and each comment stands beside its argument."
    text = Description(of_all)._repr_markdown_()
    assert '*One sentence that goes on.*\n\nAnother paragraph.' in text
    assert '**options:object, # the rest' in text and '->int: # a number' in text


@pytest.mark.parametrize('word, code, linked', [
    ('styles', 'styles = 5', False), ('styles', 'from sd_deepdive.training.data import styles', True), ('guide', 'def guide(): ...', True),
    ('text_to_image', 'styles = 5', True), ('guide()', 'styles = 5', True), ('walk()', 'def walk(): ...', False)])
def test_words_that_are_links(word, code, linked):
    "On the page of `guide`: a plain word is linked only where the notebook defines or imports it, and what it defines itself to no other page."
    nb = AttrDict(cells=[mk_cell(code), mk_cell(f'See `{word}`.', 'markdown')], path_=CFG.nbs_path/'02_guidance.ipynb')
    links = add_links(nb)
    for cell in nb.cells: links.cell(cell)
    assert ('](' in nb.cells[1].source) == linked


@pytest.mark.parametrize('nb, page', LESSONS)
def test_lesson_page(site, nb, page):
    "A lesson is in the sidebar, opens in Colab and Kaggle from this repository, and describes its pictures."
    doc = soup(site/page)
    assert doc.select(f'#quarto-sidebar a[href$="{page}"]'), f'{nb} is not in the sidebar of _quarto.yml'
    links = [a['href'] for a in doc.select('main a[href]')]
    source = f'{CFG.user}/{CFG.repo}/blob/{CFG.branch}/nbs/{nb}'
    for host in ('colab.research.google.com', 'kaggle.com'):
        assert any(urlsplit(link).hostname == host and link.endswith(source) for link in links), host
    nameless = [img['src'][:60] for img in doc.select('main img') if not img.get('alt', '').strip()]
    assert not nameless, f'no `#| fig-alt:` for {nameless}'


EXPORTED = [(page, module) for nb, page in LESSONS for cell in read_nb(CFG.nbs_path/nb).cells if (module := cell.directives.get('default_exp'))]


@pytest.mark.parametrize('page, module', EXPORTED)
def test_source(site, page, module):
    "What a lesson exports has a link to its source, also where nbdev's index leaves the notebook out."
    assert f'/{CFG.lib_path.name}/{module.replace(".", "/")}.py#L' in (site/page).read_text()


def test_links(site):
    "Every link, picture, script and stylesheet of the site exists, anchors included."
    pages = {f.name: soup(f) for f in site.glob('*.html')}
    missing = []
    for name, doc in pages.items():
        for tag in doc.select('[href], [src]'):
            url = urlsplit(tag.get('href') or tag.get('src'))
            if url.scheme or url.netloc: continue
            target = unquote(url.path) or name
            anchor = unquote(url.fragment)
            if not (site/target).exists() or anchor and target in pages and not pages[target].find(id=anchor):
                missing.append((name, url.geturl()))
    assert len(pages) == len(PAGES)
    assert missing == []
