import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from fewshot_nlp.data.columns import checked_texts, class_names, find_columns, readable

STRING, INT, FLOAT = Value("string"), Value("int64"), Value("float64")
LABEL = ClassLabel(names=["no", "yes"])


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"text": STRING, "label": LABEL}, ("text", "label")),
        ({"label": STRING, "sentence": STRING}, ("sentence", "label")),
        ({"utterance": STRING, "intent": INT, "id": INT}, ("utterance", "intent")),
        ({"id": STRING, "query": STRING, "category": STRING}, ("query", "category")),
        # A ClassLabel is a label whatever it is called, and beats a usual name.
        ({"label": STRING, "text": STRING, "kind": LABEL}, ("text", "kind")),
        # The only string column holds the texts whatever it is called.
        ({"what_was_said": STRING, "label": LABEL, "id": INT}, ("what_was_said", "label")),
        ({"Text": STRING, "note": STRING, "Label": INT}, ("Text", "Label")),
        # Ints beside a missing one are floats in a table of pandas; beside other labels, floats are something else.
        ({"text": STRING, "id": INT, "label": FLOAT}, ("text", "label")),
        ({"text": STRING, "topic": INT, "target": FLOAT}, ("text", "topic")),
    ],
)
def test_columns_are_found_by_type_and_usual_name(features, expected):
    assert find_columns(Features(features)) == expected


def test_named_columns_win():
    features = Features({"text": STRING, "note": STRING, "label": LABEL, "topic": LABEL})
    assert find_columns(features, text="note", label="topic") == ("note", "topic")
    assert find_columns(features, label="label") == ("text", "label")


@pytest.mark.parametrize(
    ("features", "named", "message"),
    [
        ({"text": STRING, "label": LABEL}, {"text": "txt"}, "text_column_name='txt' is not a column.*text.*label"),
        ({"text": STRING, "label": LABEL}, {"label": "lable"}, "label_column_name='lable' is not a column"),
        ({"text": STRING, "sentence": STRING, "label": LABEL}, {}, "holds the texts.*'text', 'sentence'.*Set text_col"),
        ({"text": STRING, "label": LABEL, "intent": LABEL}, {}, "holds the labels.*'label', 'intent'.*Set label_col"),
        ({"text": STRING, "x": LABEL, "y": LABEL}, {}, "holds the labels: no column has a usual name.*x.*y"),
        ({"a": STRING, "b": STRING, "label": LABEL}, {}, "holds the texts: no column has a usual name"),
        ({"text": STRING, "label": Value("bool")}, {}, "holds the labels"),
        ({"text": STRING, "label": Value("bool")}, {"label": "label"}, "neither ClassLabel, strings nor ints"),
        ({"text": STRING, "label": Sequence(INT)}, {"label": "label"}, "neither ClassLabel, strings nor ints"),
        ({"text": INT, "label": LABEL}, {"text": "text"}, "text_column_name='text' does not hold strings"),
        ({"text": STRING, "label": LABEL}, {"text": "text", "label": "text"}, "are both 'text'"),
    ],
)
def test_columns_that_cannot_be_told_are_an_error(features, named, message):
    with pytest.raises(ValueError, match=message):
        find_columns(Features(features), **named)


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (LABEL, [1, 0, 1], ["yes", "no", "yes"]),
        (INT, [7, 0, 7], ["7", "0", "7"]),
        (FLOAT, [7.0, 0.0], ["7", "0"]),
        (STRING, ["b", "a"], ["b", "a"]),
    ],
)
def test_class_names_are_text(feature, values, names):
    dataset = Dataset.from_dict({"label": values}, features=Features({"label": feature}))
    assert class_names(dataset, "label") == names
    assert class_names(dataset.with_format("torch") if feature is INT else dataset, "label") == names


@pytest.mark.parametrize(
    ("feature", "value"), [(LABEL, -1), (LABEL, None), (STRING, None), (STRING, ""), (INT, None), (FLOAT, None)]
)
def test_a_row_without_label_is_an_error(feature, value):
    other = "x" if feature is STRING else 1
    dataset = Dataset.from_dict({"label": [other, value]}, features=Features({"label": feature}))
    with pytest.raises(ValueError, match=r"Row 11 has no label .*dataset\.filter"):
        class_names(dataset, "label", first_row=10)


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        (STRING, " ", r"Row 1 has a blank label \(label=' '\)\. Give the class a name"),
        (ClassLabel(names=["x", "\t"]), 1, "Row 1 has a blank label"),
        (FLOAT, 0.5, r"Row 1 has a label that is no whole number \(label=0\.5\)\. Name another column"),
        (FLOAT, float("nan"), r"no whole number \(label=nan\)"),
    ],
)
def test_a_label_that_is_no_name_is_an_error(feature, value, message):
    other = "x" if feature is STRING else 0
    dataset = Dataset.from_dict({"label": [other, value]}, features=Features({"label": feature}))
    with pytest.raises(ValueError, match=message):
        class_names(dataset, "label")


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_text_is_an_error(text):
    dataset = Dataset.from_dict({"text": ["fine", "fine too", text]}, features=Features({"text": STRING}))
    with pytest.raises(ValueError, match=r"Row 2 has an empty text .*dataset\.filter"):
        checked_texts(dataset, "text")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("card_arrival", "card arrival"),
        ("reverted_card_payment?", "reverted card payment"),
        ("PlayMusic", "play music"),
        ("atm-support", "atm support"),
        ("GetPin2Code", "get pin2 code"),
        ("überweisung", "überweisung"),
        ("?!", "?!"),
    ],
)
def test_a_class_name_in_words(name, words):
    assert readable(name) == words
