"""Hand setuptools the fields that pyproject.toml declares dynamic: settings.ini holds their values."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser()
ini.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
c = ini['DEFAULT']

setup(
    author=c['author'], license_expression=c['license'], keywords=c['keywords'].split(),
    classifiers=c['classifiers'].strip().splitlines(), python_requires='>=' + c['min_python'],
    install_requires=c['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k, v in c.items() if k.endswith('_requirements')},
)
