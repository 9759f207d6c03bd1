"Build the package from settings.ini, the one place that holds its metadata."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

PYTHONS = ['3.10', '3.11', '3.12', '3.13']
STATUSES = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
LICENSES = {'apache2': 'Apache-2.0'}

root = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def words(key):
    "The white-space separated values of `key` in settings.ini."
    return cfg.get(key, '').split()


def long_description():
    "The text of README.md."
    readme = root/'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else cfg['description']


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=long_description(),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license=LICENSES[cfg['license']],
    keywords=words('keywords'),
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'] + '/', 'Source': cfg['git_url']},
    classifiers=[
        f"Development Status :: {STATUSES[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        *(f'Programming Language :: Python :: {v}' for v in PYTHONS[PYTHONS.index(cfg['min_python']):]),
    ],
    python_requires='>=' + cfg['min_python'],
    packages=[*find_packages(include=['prunebook', 'prunebook.*']), 'prunebook.results'],
    package_dir={'prunebook.results': 'results'},          # no second copy in the repository
    package_data={'prunebook': ['passages/*.txt', 'figures/*', '*.py.txt', '*.mplstyle'],
                  'prunebook.results': ['*.json', '*.yml', '*/*.json', '*/*.yml']},
    install_requires=words('requirements'),
    extras_require={'dev': words('dev_requirements'), 'eval': words('eval_requirements'), 'recover': words('recover_requirements')},
    entry_points={
        'console_scripts': words('console_scripts'),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
