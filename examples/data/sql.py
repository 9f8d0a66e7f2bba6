"""The `sql` task: a table and a question in, one SQLite query out and nothing else."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from random import Random

from .tables import Category, Measure, Schema, load_schemas
from .task import Example, HeldOut, Task, made_up_word, user


@dataclass(frozen=True)
class Draw:
    """One random choice of everything a question may mention."""

    schema: Schema
    category: Category
    value: str
    measure: Measure
    number: int
    rng: Random

    def say(self, *wordings: str) -> str:
        """Fill one of `wordings`; {many}/{one} name the rows, {some} those narrowed to the value."""
        many = self.schema.table
        return self.rng.choice(wordings).format(
            many=many,
            one=self.schema.singular,
            some=f"{many} {self.category.phrase.format(self.value)}",
            phrase=self.category.phrase.format(self.value),
            label=self.schema.label,
            cat=self.category.column,
            col=self.measure.column,
            n=self.number,
            **self._comparisons(),
        )

    def _comparisons(self) -> dict[str, str]:
        measure = self.measure
        return {"more": measure.more, "less": measure.less, "most": measure.most, "least": measure.least}

    @property
    def where(self) -> str:
        return f"WHERE {self.category.column} = '{self.value}'"


def _everything(d: Draw) -> tuple[str, str]:
    return d.say(
        "List all {many}.", "Show me every {one}.", "Give me all the {many}."
    ), f"SELECT * FROM {d.schema.table};"


def _columns(d: Draw) -> tuple[str, str]:
    question = d.say("List the {label} and {col} of all {many}.", "Show each {one}'s {label} and {col}.")
    return question, f"SELECT {d.schema.label}, {d.measure.column} FROM {d.schema.table};"


def _compare(d: Draw) -> tuple[str, str]:
    sign = d.rng.choice("><")
    verb = "{more}" if sign == ">" else "{less}"
    than = "above" if sign == ">" else "below"
    question = d.say(
        f"Which {{many}} {verb} {{n}}?",
        f"List {{many}} that {verb} {{n}}.",
        f"Find the {{many}} whose {{col}} is {than} {{n}}.",
    )
    return (
        question,
        f"SELECT {d.schema.label} FROM {d.schema.table} WHERE {d.measure.column} {sign} {d.number};",
    )


def _compare_count(d: Draw) -> tuple[str, str]:
    sign = d.rng.choice("><")
    verb = "{more}" if sign == ">" else "{less}"
    question = d.say(f"How many {{many}} {verb} {{n}}?", f"Count the {{many}} that {verb} {{n}}.")
    return question, f"SELECT COUNT(*) FROM {d.schema.table} WHERE {d.measure.column} {sign} {d.number};"


def _matching(d: Draw) -> tuple[str, str]:
    question = d.say("Which {many} are {phrase}?", "List the {some}.", "Show me all {some}.", "Find {some}.")
    return question, f"SELECT {d.schema.label} FROM {d.schema.table} {d.where};"


def _matching_compare(d: Draw) -> tuple[str, str]:
    sign = d.rng.choice("><")
    verb = "{more}" if sign == ">" else "{less}"
    question = d.say(f"Which {{some}} {verb} {{n}}?", f"List the {{some}} that {verb} {{n}}.")
    sql = f"SELECT {d.schema.label} FROM {d.schema.table} {d.where} AND {d.measure.column} {sign} {d.number};"
    return question, sql


def _count(d: Draw) -> tuple[str, str]:
    return d.say("How many {many} are there?", "Count the {many}."), f"SELECT COUNT(*) FROM {d.schema.table};"


def _matching_count(d: Draw) -> tuple[str, str]:
    question = d.say("How many {some} are there?", "How many {many} are {phrase}?", "Count the {some}.")
    return question, f"SELECT COUNT(*) FROM {d.schema.table} {d.where};"


AGGREGATES = {
    "average": "AVG",
    "mean": "AVG",
    "total": "SUM",
    "highest": "MAX",
    "maximum": "MAX",
    "lowest": "MIN",
    "minimum": "MIN",
}


def _aggregate(d: Draw) -> tuple[str, str]:
    word, function = d.rng.choice(list(AGGREGATES.items()))
    question = d.say(
        f"What is the {word} {{col}} of all {{many}}?",
        f"Find the {word} {{col}}.",
        f"What's the {word} {{one}} {{col}}?",
    )
    return question, f"SELECT {function}({d.measure.column}) FROM {d.schema.table};"


def _matching_aggregate(d: Draw) -> tuple[str, str]:
    word, function = d.rng.choice(list(AGGREGATES.items()))
    question = d.say(
        f"What is the {word} {{col}} of {{some}}?", f"Compute the {word} {{col}} of the {{some}}."
    )
    return question, f"SELECT {function}({d.measure.column}) FROM {d.schema.table} {d.where};"


def _group_aggregate(d: Draw) -> tuple[str, str]:
    word, function = d.rng.choice(list(AGGREGATES.items()))
    question = d.say(
        f"What is the {word} {{col}} per {{cat}}?",
        f"Show the {word} {{col}} for each {{cat}}.",
        f"Find the {word} {{col}} of {{many}} by {{cat}}.",
    )
    cat = d.category.column
    return question, f"SELECT {cat}, {function}({d.measure.column}) FROM {d.schema.table} GROUP BY {cat};"


def _group_count(d: Draw) -> tuple[str, str]:
    question = d.say(
        "How many {many} are there per {cat}?",
        "Count the {many} for each {cat}.",
        "How many {many} does each {cat} have?",
    )
    return (
        question,
        f"SELECT {d.category.column}, COUNT(*) FROM {d.schema.table} GROUP BY {d.category.column};",
    )


def _extreme(d: Draw) -> tuple[str, str]:
    most = d.rng.random() < 0.6
    word, edge = ("{most}", "highest") if most else ("{least}", "lowest")
    question = d.say(
        f"Which {{one}} is the {word}?",
        f"What is the {word} {{one}}?",
        f"Find the {word} {{one}}.",
        f"Which {{one}} has the {edge} {{col}}?",
    )
    return question, f"SELECT {d.schema.label} {_ordered(d, most)} LIMIT 1;"


def _matching_extreme(d: Draw) -> tuple[str, str]:
    question = d.say(
        "Which of the {some} is the {most}?",
        "What is the {most} {one} {phrase}?",
        "Which {one} {phrase} has the highest {col}?",
    )
    order = f"ORDER BY {d.measure.column} DESC LIMIT 1;"
    return question, f"SELECT {d.schema.label} FROM {d.schema.table} {d.where} {order}"


COUNTS = ((2, "two"), (3, "three"), (4, "four"), (5, "five"), (10, "ten"), (7, "7"))


def _top(d: Draw) -> tuple[str, str]:
    most = d.rng.random() < 0.6
    word, edge = ("{most}", "highest") if most else ("{least}", "lowest")
    count, name = d.rng.choice(COUNTS)
    question = d.say(
        f"What are the {name} {word} {{many}}?",
        f"Show the {count} {word} {{many}}.",
        f"List the {name} {{many}} with the {edge} {{col}}.",
    )
    return question, f"SELECT {d.schema.label} {_ordered(d, most)} LIMIT {count};"


def _matching_top(d: Draw) -> tuple[str, str]:
    most = d.rng.random() < 0.5
    word, order = ("{most}", "DESC") if most else ("{least}", "ASC")
    count, name = d.rng.choice(COUNTS)
    question = d.say(f"What are the {name} {word} {{some}}?", f"Show the {name} {word} {{many}} {{phrase}}.")
    table, column = d.schema.table, d.measure.column
    return (
        question,
        f"SELECT {d.schema.label} FROM {table} {d.where} ORDER BY {column} {order} LIMIT {count};",
    )


def _sorted(d: Draw) -> tuple[str, str]:
    most = d.rng.random() < 0.5
    ends = "from {most} to {least}" if most else "from {least} to {most}"
    edge = "highest" if most else "lowest"
    question = d.say(f"List the {{many}} {ends}.", f"Sort all {{many}} by {{col}}, {edge} first.")
    return question, f"SELECT {d.schema.label} {_ordered(d, most)};"


def _ordered(d: Draw, descending: bool) -> str:
    return f"FROM {d.schema.table} ORDER BY {d.measure.column} {'DESC' if descending else 'ASC'}"


def _distinct(d: Draw) -> tuple[str, str]:
    question = d.say(
        "What are the different values of {cat}?", "List every distinct {cat}.", "Show each {cat} once."
    )
    return question, f"SELECT DISTINCT {d.category.column} FROM {d.schema.table};"


def _prefix(d: Draw) -> tuple[str, str]:
    letter = d.rng.choice("ABCDEFGHKLMNPRSTVW")
    question = d.say(
        f"Which {{many}} have a {{label}} starting with {letter}?",
        f"Find {{many}} whose {{label}} begins with {letter}.",
    )
    return question, f"SELECT {d.schema.label} FROM {d.schema.table} WHERE {d.schema.label} LIKE '{letter}%';"


def _between(d: Draw) -> tuple[str, str]:
    upper = d.number + d.rng.randint(2, 50)
    question = d.say(
        f"Which {{many}} have their {{col}} between {{n}} and {upper}?",
        f"List {{many}} whose {{col}} is from {{n}} to {upper}.",
    )
    span = f"BETWEEN {d.number} AND {upper}"
    return question, f"SELECT {d.schema.label} FROM {d.schema.table} WHERE {d.measure.column} {span};"


QUESTIONS: tuple[Callable[[Draw], tuple[str, str]], ...] = (
    *(_everything, _columns, _distinct, _sorted, _prefix, _between, _compare, _compare, _compare_count),
    *(_matching, _matching_count, _matching_compare, _matching_aggregate, _matching_extreme, _matching_top),
    *(_count, _aggregate, _group_count, _group_aggregate, _top, _extreme, _extreme),
)
FRAMES = (
    "Table {table}({columns}). {question}",
    "Table: {table}({columns})\nQuestion: {question}",
    "Given the table {table}({columns}): {question}",
    "{question} The table is {table}({columns}).",
)


def _frame(frame: str, table: str, columns: list[str], question: str) -> str:
    return frame.format(table=table, columns=", ".join(columns), question=question)


def _draw(rng: Random, schemas: tuple[Schema, ...]) -> Draw:
    schema = rng.choice(schemas)
    category, measure = rng.choice(schema.categories), rng.choice(schema.measures)
    number = rng.randint(measure.low, measure.high)
    value = rng.choice(category.values) if rng.random() < 0.5 else made_up_word(rng)
    return Draw(schema, category, value, measure, number, rng)


def _example(rng: Random, schemas: tuple[Schema, ...], index: int) -> Example:
    draw = _draw(rng, schemas)
    question, sql = QUESTIONS[index % len(QUESTIONS)](draw)
    columns = draw.schema.columns
    rng.shuffle(columns)
    if rng.random() < 0.4:
        columns.insert(0, "id")
    return Example.of_answer(_frame(rng.choice(FRAMES), draw.schema.table, columns, question), sql)


def _examples(rng: Random, count: int) -> list[Example]:
    schemas = load_schemas()
    return [_example(rng, schemas, index) for index in range(count)]


def _runs(table: str, columns: list[str], answer: str) -> bool:
    """Whether `answer` is a query that SQLite accepts over `table`."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
        try:
            db.execute(answer)
        except (sqlite3.Error, sqlite3.Warning):
            return False
    return answer.startswith("SELECT")


def _held_out(table: str, columns: str, question: str, frame: int = 0) -> HeldOut:
    names = columns.split()
    prompt = _frame(FRAMES[frame], table, names, question)
    return HeldOut((user(prompt),), partial(_runs, table, names))


SQL = Task(
    "sql",
    _examples,
    (
        _held_out("volcanoes", "id name country height", "Which volcanoes are taller than 3000?"),
        _held_out("trains", "number destination speed seats", "What is the fastest train?", 1),
        _held_out("patients", "name age ward", "How many patients are in each ward?"),
        _held_out(
            "invoices", "id client amount paid", "What is the total amount of invoices for client Acme?", 2
        ),
        _held_out("wines", "name region vintage price", "Show the three cheapest wines from Rioja."),
        _held_out("planets", "name moons mass", "Which planets have more than 10 moons?", 3),
        _held_out("tickets", "id agent status hours", "How many tickets have the status open?"),
        _held_out("astronauts", "name country missions age", "What is the average age of astronauts?", 1),
        _held_out("bakeries", "name city revenue", "Which bakery in Lyon has the highest revenue?"),
        _held_out("lakes", "name depth area", "Sort the lakes from deepest to shallowest."),
    ),
)
