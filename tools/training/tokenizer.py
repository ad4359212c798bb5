"""The tokenizer of Stable Diffusion 1.x, CLIP's byte-pair encoding with 49408 ids, from the list of merges alone."""
import gzip
import json
import zipfile
from pathlib import Path

from transformers import CLIPTokenizer

from sd_deepdive.training.sources import fetch, sources

VOCABULARY, START, END = 49408, '<|startoftext|>', '<|endoftext|>'


def byte_characters() -> list[str]:
    "One printable character for each byte: printable Latin-1 stands for itself, the others follow from code point 256 on."
    printable = [*range(ord('!'), ord('~')+1), *range(ord('¡'), ord('¬')+1), *range(ord('®'), ord('ÿ')+1)]
    return [chr(b) for b in printable] + [chr(256+i) for i in range(256-len(printable))]


def merges(packages: Path) -> list[str]:
    "The pairs that are joined, most frequent first: as many as the vocabulary has room for."
    wheel = fetch(**sources()['tokenizer'], folder=packages)
    with zipfile.ZipFile(wheel) as z:
        lines = gzip.decompress(z.read('open_clip/bpe_simple_vocab_16e6.txt.gz')).decode().split('\n')
    return lines[1:VOCABULARY - 512 - 2 + 1]


def save_tokenizer(folder: Path, pairs: list[str]) -> CLIPTokenizer:
    "Write vocab.json, merges.txt and the configuration, as a Stable Diffusion checkpoint has them; return what loads from there."
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_characters()
    tokens = alphabet + [c+'</w>' for c in alphabet] + [''.join(p.split()) for p in pairs] + [START, END]
    (folder/'vocab.json').write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False, separators=(',', ':')))
    (folder/'merges.txt').write_text('#version: 0.2\n' + '\n'.join(pairs) + '\n')
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='CLIPTokenizer', model_max_length=77, bos_token=START,
        eos_token=END, unk_token=END, pad_token=END, do_lower_case=True), indent=2))
    return CLIPTokenizer.from_pretrained(folder)
