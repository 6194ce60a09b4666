"""Which language is this word? A bidirectional LSTM reads it letter by letter.

The package Babel carries what Unicode's CLDR project collects: the names of languages, scripts, countries, cities,
currencies, units, months and days. Their words in 24 languages with Latin letters are the data: 3 to 28 letters, in
lower case. A word that two of the languages share is left out. The words of the test are never seen in training, nor
is any other that begins with the same four letters: neither another form of the word, nor its cousins elsewhere.

The words of a batch have different lengths. `lengths=` tells the layer where each one ends, so the last states of both
directions have read the whole word and no padding. Two logistic regressions learn from the same words. One knows how
often each letter occurs. The other also counts pairs and triples of letters, and is a strong rival.

With the defaults and Babel 2.19.0, expect that the LSTM is right about 68% of the words, the regression on letters
about 47%, and that on triples about 68%. The picture shows which languages are taken for which. It takes two to five
minutes on two cores.

    python examples/classify.py
    python examples/classify.py --ask "où est la bibliothèque" "hol van a könyvtár"     # texts of your own
    python examples/classify.py --compare     # torch.nn.LSTM in its place: the same losses, and both times
"""

import argparse
import collections
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from babel import Locale, localedata
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from tqdm import trange

import beside_torch
import fusedlstm
from fusedlstm.inspect.plots import new_figure

FAMILIES = ("da nb sv is nl de en", "fr ca es pt it ro", "pl cs sk sl hr", "lt lv", "fi et hu", "tr")
LANGUAGES = " ".join(FAMILIES).split()
NAMES = [Locale(code).english_name.split()[0] for code in LANGUAGES]
# What is named in every language.
KINDS = (
    *("languages", "scripts", "territories", "currency_names", "currency_names_plural", "unit_display_names"),
    *("unit_patterns", "date_fields", "months", "days", "time_zones", "meta_zones"),
)
PREFIX = 4  # words that begin with so many equal letters are all in training, or all in the test


def words_of(text: str) -> list[str]:
    """The words of a text. Those of one or two letters are left out, because most are abbreviations."""
    return [word for word in re.findall(r"\w+", text.lower()) if word.isalpha() and len(word) > 2]


def texts_in(data: object) -> Iterator[str]:
    if isinstance(data, dict):
        for value in data.values():
            yield from texts_in(value)
    elif isinstance(data, str):
        yield data


def collected() -> dict[str, int]:
    """Each word that only one of the languages has, and the number of the language."""
    found = collections.defaultdict(set)
    for language, code in enumerate(LANGUAGES):
        data = localedata.load(code)
        for kind in KINDS:
            for text in texts_in(data[kind]):
                for word in words_of(text):
                    found[word].add(language)
    return {word: min(languages) for word, languages in sorted(found.items()) if len(languages) == 1}


def split(words: dict[str, int], seed: int = 0) -> tuple[list[str], list[str]]:
    """Words for training and for the test, in random order. No prefix is in both."""
    prefixes = sorted({word[:PREFIX] for word in words})
    tested = {*random.Random(seed).sample(prefixes, len(prefixes) // 8)}
    shuffled = random.Random(seed).sample([*words], len(words))
    return [word for word in shuffled if word[:PREFIX] not in tested], [w for w in shuffled if w[:PREFIX] in tested]


def alphabet_of(words: list[str]) -> str:
    return "".join(sorted({*"".join(words)}))


class Model(nn.Module):
    """From letters [T, B] to logits [B, languages]. A letter that was never seen is number 0."""

    def __init__(self, letters: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters + 1, 32)
        self.lstm = fusedlstm.LSTM(32, hidden_size, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden_size, len(LANGUAGES))

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        x = self.dropout(self.embedding(letters))
        if isinstance(self.lstm, fusedlstm.LSTM):
            _, (h_n, _) = self.lstm(x, lengths=lengths)
        else:
            _, (h_n, _) = self.lstm(pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False))
        return self.head(self.dropout(h_n.transpose(0, 1).flatten(1)))


def coded(words: list[str], alphabet: str, device: str) -> tuple[Tensor, Tensor]:
    """Words as numbers, [T, B], and their lengths [B]."""
    rows = [torch.tensor([alphabet.find(letter) + 1 for letter in word]) for word in words]
    return pad_sequence(rows).to(device), torch.tensor([len(row) for row in rows], device=device)


def train(
    model: nn.Module, seen: list[str], words: dict[str, int], args: argparse.Namespace, name: str
) -> tuple[list[float], float]:
    """The loss of every update, and the median time of one in ms."""
    draw, alphabet = random.Random(args.seed), alphabet_of(seen)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.updates)
    torch.manual_seed(args.seed)  # of the dropout
    losses, times = [], []
    for _ in trange(args.updates, desc=name, leave=False, disable=None):
        batch = draw.sample(seen, args.batch)
        letters, lengths = coded(batch, alphabet, args.device)
        answers = torch.tensor([words[word] for word in batch], device=args.device)
        start = time.perf_counter()
        loss = cross_entropy(model(letters, lengths), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(1e3 * (time.perf_counter() - start))
        schedule.step()
    return losses, statistics.median(times)


@torch.no_grad()
def predicted(model: nn.Module, words: list[str], alphabet: str, device: str) -> Tensor:
    """The logarithms of the probabilities, [words, languages]."""
    model.eval()
    return model(*coded(words, alphabet, device)).log_softmax(-1).cpu()


def rivals(seen: list[str], unseen: list[str], words: dict[str, int]) -> dict[str, tuple[int, Tensor]]:
    """Two logistic regressions: the number of their weights, and what they say [unseen]."""
    kinds = {
        "letters": CountVectorizer(analyzer="char", lowercase=False),
        "triples": CountVectorizer(analyzer="char_wb", ngram_range=(1, 3), lowercase=False),
    }
    found = {}
    for name, counts in kinds.items():
        model = make_pipeline(counts, LogisticRegression(C=0.3, max_iter=1000))
        model.fit(seen, [words[word] for word in seen])
        found[f"regression on {name}"] = model[-1].coef_.size, torch.tensor(model.predict(unseen))
    return found


def confusion_of(answers: Tensor, found: Tensor) -> Tensor:
    """Which share of the words of each language is given to which, [true, found]."""
    pairs = torch.bincount(answers * len(NAMES) + found, minlength=len(NAMES) ** 2).view(len(NAMES), -1)
    return pairs / pairs.sum(1, keepdim=True)


def picture(confusion: Tensor, path: Path) -> None:
    """Draw the shares [true, found]."""
    figure = new_figure(8, 7.7)
    panel = figure.subplots()
    panel.imshow(confusion.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    for true, found in (confusion >= 0.045).nonzero().tolist():
        share = confusion[true, found].item()
        shade = "white" if share > 0.3 else "black"
        panel.text(found, true, f"{100 * share:.0f}", color=shade, fontsize=8, ha="center", va="center")
    panel.set_xticks(range(len(NAMES)), NAMES, rotation=90)
    panel.set_yticks(range(len(NAMES)), NAMES)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    at = -0.5
    for family in FAMILIES:
        at += len(family.split())
        if at < len(NAMES) - 1:
            panel.axhline(at, color="0.6", linewidth=0.8)
            panel.axvline(at, color="0.6", linewidth=0.8)
    panel.set(xlabel="taken for", ylabel="language of the word")
    panel.set_title("words that were not seen (%), of each language", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def learn(words: dict[str, int], args: argparse.Namespace, console: Console) -> None:
    """Train, and set the LSTM beside its rivals on words that were not seen."""
    seen, unseen = split(words)
    alphabet, answers = alphabet_of(seen), torch.tensor([words[word] for word in unseen])
    torch.manual_seed(args.seed)
    model = Model(len(alphabet), args.hidden_size, args.dropout).to(args.device)
    _, ms = train(model, seen, words, args, "training")
    with console.status("logistic regressions"):
        found = rivals(seen, unseen, words)
    weights = sum(parameter.numel() for parameter in model.parameters())
    found["bidirectional LSTM"] = weights, predicted(model, unseen, alphabet, args.device).argmax(-1)
    table = Table(title=f"{len(unseen):,} words that were not seen, after training on {len(seen):,}")
    table.add_column("who reads them")
    for name in ("weights", "right", "mean of the languages"):
        table.add_column(name, justify="right")
    for name, (weights, languages) in found.items():
        confusion = confusion_of(answers, languages)  # in the end, that of the LSTM
        right = (languages == answers).float().mean().item()
        table.add_row(name, f"{weights:,}", f"{right:.1%}", f"{confusion.diag().mean().item():.1%}")
    console.print(table)
    mistaken = (confusion - confusion.diag().diag()).flatten().topk(3)
    pairs = [
        f"{NAMES[at // len(NAMES)]} for {NAMES[at % len(NAMES)]} ({share:.0%})"
        for share, at in zip(mistaken.values.tolist(), mistaken.indices.tolist(), strict=True)
    ]
    console.print(f"The LSTM most often takes {', '.join(pairs)}. Median update: {ms:.1f} ms.")
    for text in args.ask:
        chances, languages = predicted(model, words_of(text), alphabet, args.device).sum(0).softmax(-1).topk(3)
        guesses = [f"{NAMES[k]} {share:.0%}" for share, k in zip(chances.tolist(), languages.tolist(), strict=True)]
        console.print(f"{text}: {', '.join(guesses)}", highlight=False, markup=False)
    picture(confusion, args.out / "classify.png")
    console.print(f"picture: {args.out / 'classify.png'}")


def compare(words: dict[str, int], args: argparse.Namespace, console: Console) -> None:
    """The same training with our layer and with torch's, which needs packing."""
    seen, _ = split(words)
    beside_torch.compare(
        lambda: Model(len(alphabet_of(seen)), args.hidden_size, args.dropout).to(args.device),
        lambda model, name: train(model, seen, words, args, name),
        args.seed,
        console,
        "Losses",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="It prints how many words are given to the right language, by the LSTM and by two logistic regressions,"
        " and draws which languages are taken for which. No word that begins like one of the test is in training.",
    )
    helps = {
        "updates": (4000, "of the network"),
        "batch": (64, "words of an update"),
        "hidden-size": (192, "hidden units of each direction"),
        "seed": (0, "of initial values, dropout and the order of the words"),
    }
    for name, (default, text) in helps.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: {default}")
    for name, value, text in (("rate", 5e-3, "of Adam, at its highest"), ("dropout", 0.3, "of letters and of states")):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{text}; default: {value:g}")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )
    parser.add_argument("--ask", nargs="+", default=[], metavar="TEXT", help="words or sentences to judge in the end")
    parser.add_argument("--compare", action="store_true", help="train with torch.nn.LSTM too, 200 updates of each")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for classify.png (default: out)")
    args = parser.parse_args(arguments)
    if not all(map(words_of, args.ask)):
        parser.error(f"--ask: expected words, got {args.ask}")
    if args.compare:
        args.updates = min(args.updates, 200)
    (compare if args.compare else learn)(collected(), args, Console())


if __name__ == "__main__":
    main()
