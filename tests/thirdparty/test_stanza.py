"""stanza: packed sequences in the lemmatizer and in the character language model, and decoders of nn.LSTMCell."""

import pytest
import torch
from stanza.models.charlm import batchify, get_batch, repackage_hidden
from stanza.models.common.char_model import CharacterLanguageModelTrainer
from stanza.models.common.doc import Document
from stanza.models.common.vocab import CharVocab
from stanza.models.lemma.data import DataLoader
from stanza.models.lemma.trainer import Trainer
from stanza.models.lemmatizer import parse_args

FORMS = ["runs", "walked", "mice", "went", "better", "houses", "is", "generalizations", "sang", "feet", "wolves", "a"]
LEMMAS = ["run", "walk", "mouse", "go", "good", "house", "be", "generalization", "sing", "foot", "wolf", "a"]


def train_lemmatizer(built):
    sizes = "--batch_size 4 --hidden_dim 16 --emb_dim 6 --pos_dim 6"
    args = parse_args(f"{sizes} --optim sgd --lr 0.1 --cpu".split())
    words = [
        {"id": k, "text": form, "upos": "X", "lemma": lemma, "head": k - 1, "deprel": "dep"}
        for k, (form, lemma) in enumerate(zip(FORMS, LEMMAS, strict=True), 1)
    ]
    batches = DataLoader(Document([words]), args["batch_size"], args)
    args |= {"vocab_size": batches.vocab["char"].size, "pos_vocab_size": batches.vocab["pos"].size}
    trainer = Trainer(args=args, vocab=batches.vocab, device="cpu")
    built(trainer.model)
    losses = [trainer.update(batch) for _ in range(3) for batch in batches]
    return trainer.model, losses


def test_lemmatizer(both):
    both(train_lemmatizer)


@pytest.mark.parametrize("rec_dropout", [0, 0.2], ids=["LSTM", "LSTMCell"])
def test_character_language_model(both, rec_dropout):
    def train(built):
        text = " ".join(FORMS + LEMMAS)
        vocab = {"char": CharVocab([sorted(set(text))])}
        args = {"char_emb_dim": 6, "char_hidden_dim": 12, "char_num_layers": 2, "char_dropout": 0.1}
        args |= {"char_rec_dropout": rec_dropout, "direction": "forward", "device": "cpu"}
        args |= {"lr0": 1.0, "momentum": 0.0, "weight_decay": 0.0, "anneal": 0.25, "patience": 1}
        trainer = CharacterLanguageModelTrainer.from_new_model(args, vocab)
        built(trainer.model)

        # The loop of stanza.models.charlm.train, which reads and writes files.
        batches = batchify(torch.tensor(vocab["char"].map(text)), 3, "cpu")
        hidden, losses = None, []
        for i in range(0, batches.size(1) - 2, 8):
            data, target = get_batch(batches, i, 8)
            trainer.optimizer.zero_grad()
            _, hidden, decoded = trainer.model(data, [data.size(1)] * len(data), hidden)
            loss = trainer.criterion(decoded.view(len(target), -1), target)
            loss.backward()
            trainer.optimizer.step()
            hidden = repackage_hidden(hidden)
            losses.append(loss.item())
        return trainer.model, losses

    both(train)
