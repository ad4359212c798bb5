"""What becomes of a finished page: figures as wide as their letters want, code that wraps behind its indent and is shown once, contents for small screens."""
import re
from base64 import b64decode
from io import BytesIO

from PIL import Image

FIGURE = re.compile(r'<img (?=[^>]*src="data:image/png;base64,([^"]+)")')
CODE = re.compile(r'(<code class="sourceCode[^>]*>)(.*?)(</code>)', re.S)
CELL = re.compile(r'<td([^>]*)>([^<]{1,20})</td>')
OPEN = re.compile('<details open="" class="code-fold">\\s*<summary>The code of ([^<]*)</summary>')
SIGNATURE = re.compile(r'(<h3 [^>]*>(?:\w+\.)?(\w+)</h3>\s*)<div class="code-copy-outer-scaffold">.*?</button></div>', re.S)
CONTENTS = re.compile(r'<nav id="TOC".*?(<ul>.*?</ul>)(?=<div|</nav>)', re.S)
TITLE = re.compile('<main.*?</header>', re.S)


def sized(found):
    """An `<img>` of a figure with its width: figures are saved with 200 dots to the inch, and at 125 their letters are about as large
    as the text's. A wide one is marked, so that a phone need not make its letters too small to read; pictures have no letters, unless they are figures with a palette."""
    image = Image.open(BytesIO(b64decode(found[1])))
    dots = image.info.get('dpi', (0,))[0]
    width = round(image.width*125/200) if dots > 150 else image.width
    return '<img ' + f'width="{width}" '*(dots > 150) + 'data-wide '*((dots > 0 or image.mode == 'P') and width > 480)


def hanging(found):
    "A block of code with each line in a box of its own, so that what is wrapped stands behind its indent."
    opened, lines = [], []
    for line in found[2].split('\n'):
        text, before = re.sub('<[^>]*>', '', line), ''.join(opened)
        for tag in re.findall('<[^>]*>', line): opened.pop() if tag.startswith('</') else opened.append(tag)
        inside = before + line + ''.join(f'</{re.match("<([a-z]+)", tag)[1]}>' for tag in reversed(opened))
        indent = len(text) - len(text.lstrip())
        lines.append(f'<span class="line" style="--indent: {indent}ch">{inside}</span>' if text.strip() else inside)
    return found[1] + '\n'.join(lines) + found[3]


def said_once(html):
    "The page without the signatures of what stands open on it: the code begins with them."
    shown = {name for names in OPEN.findall(html) for name in names.split(', ')}
    return SIGNATURE.sub(lambda found: found[1] if found[2] in shown else found[0], html)


def with_contents(html):
    "The page with its contents below the title too, folded, for screens that have no room beside the text."
    if not (found := CONTENTS.search(html)): return html
    links = re.sub(r' (id|class|data-scroll-target)="[^"]*"', '', found[1])
    folded = f'<details class="contents"><summary>On this page</summary>{links}</details>'
    return TITLE.sub(lambda title: title[0] + folded, html, count=1)


def readable(html):
    "The page, for screens large and small."
    return with_contents(CELL.sub(r'<td class="short"\1>\2</td>', CODE.sub(hanging, FIGURE.sub(sized, said_once(html)))))
