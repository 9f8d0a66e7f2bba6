"""The `json` task: a sentence in, the facts it states as one JSON object out."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from string import Formatter

from .task import Example, HeldOut, Task, made_up_word, user

Words = dict[str, list[str]]
Fact = str | int | float


def _date(rng: Random, words: Words) -> str:
    day, month, year = rng.randint(1, 28), rng.choice(words["month"]), rng.randint(1950, 2025)
    return rng.choice(
        (f"{day} {month} {year}", f"{month} {day}, {year}", f"{day} {month}", f"{year}-03-{day:02}")
    )


def _time(rng: Random, _words: Words) -> str:
    hour, minute = rng.randint(1, 12), rng.choice(("00", "15", "30", "45", "20"))
    return rng.choice((f"{hour}:{minute}", f"{hour} pm", f"{hour + 10}:{minute}", f"{hour}:{minute} am"))


def _or_made_up(rng: Random, known: list[str]) -> str:
    return rng.choice(known) if rng.random() < 0.6 else made_up_word(rng)


def _noun(rng: Random, known: list[str]) -> str:
    return rng.choice(known) if rng.random() < 0.7 else made_up_word(rng).lower()


def _name(rng: Random, words: Words) -> str:
    first, last = _or_made_up(rng, words["first"]), _or_made_up(rng, words["last"])
    return rng.choice((f"{first} {last}", f"{first} {last}", first, f"{rng.choice(words['title'])} {last}"))


def _email(rng: Random, words: Words) -> str:
    domain = rng.choice(("mail.com", "example.org", "post.net", "northwind.com", "uni.edu"))
    user = rng.choice(words["first"]) + rng.choice((".", "_", "")) + rng.choice(words["last"])
    return f"{user.lower()}@{domain}"


# Fields drawn otherwise than from the list of words of the same name.
FIELDS: dict[str, Callable[[Random, Words], Fact]] = {
    "name": _name,
    "date": _date,
    "time": _time,
    "email": _email,
    "phone": lambda rng, _: f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
    "age": lambda rng, _: rng.randint(4, 95),
    "quantity": lambda rng, _: rng.randint(2, 60),
    "price": lambda rng, _: rng.choice((rng.randint(3, 900), rng.randint(300, 9000) / 100)),
    "city": lambda rng, words: _or_made_up(rng, words["city"]),
    "from": lambda rng, words: rng.choice(words["city"][::2]),
    "to": lambda rng, words: rng.choice(words["city"][1::2]),
    "job": lambda rng, words: _noun(rng, words["job"]),
    "product": lambda rng, words: _noun(rng, words["product"]),
    "pet": lambda rng, words: _noun(rng, words["pet"]),
    "company": lambda rng, words: _or_made_up(rng, words["company"]),
    "pet_name": lambda rng, words: _or_made_up(rng, words["pet_name"]),
}

# The keys of the answer are the fields of the sentence, in the order they are mentioned.
SENTENCES = (
    "{name} moved to {city} on {date}.",
    "On {date}, {name} moved to {city}.",
    "{name} was born in {city} on {date}.",
    "Born on {date} in {city}, {name} now works as a {job}.",
    "{name}, {age}, lives in {city} and works as a {job}.",
    "My friend {name} from {city} is {age} years old.",
    "{name} is a {age}-year-old {job} from {city}.",
    "In {city} I met {name}, a {job} who works for {company}.",
    "{company} hired {name} as a {job} on {date}.",
    "{name} has been a {job} at {company} since {date}.",
    "{company}, based in {city}, is looking for a {job}.",
    "{name} will turn {age} on {date}.",
    "{name} ordered {quantity} units of the {product} for ${price}.",
    "{name} paid ${price} for a {product} in {city}.",
    "{name} spent {price} dollars on a {product}.",
    "Lunch with {name} is at {time} on {day}.",
    "The party for {name} is on {date} at {place}.",
    "{name} left {from} and settled in {to} on {date}.",
    "After years in {from}, {name} now lives in {to}.",
    "{name} works at {company} in {city} as a {job}.",
    "{name} owns a {pet} named {pet_name}.",
    "{company} needs {quantity} of the {product} by {date}.",
    "{name} bought a {product} for {price} dollars in {city}.",
    "The {product} costs ${price} and ships from {city} on {date}.",
    "We sold {quantity} of the {product} to {company} on {date}.",
    "A {product} was delivered to {name} in {city} on {day}.",
    "{name} is flying from {from} to {to} on {date}.",
    "The train from {from} to {to} leaves at {time} on {day}.",
    "On {day} at {time} {name} takes the bus from {from} to {to}.",
    "The flight to {to} departs from {from} at {time} and costs ${price}.",
    "Meet {name} at {place} on {day} at {time}.",
    "Our meeting with {company} is on {date} at {time} in {city}.",
    "The concert starts at {time} on {date} at {place} in {city}.",
    "There is a workshop at {place} on {day}, {time}, led by {name}.",
    "You can reach {name} at {email} or {phone}.",
    "Please contact {name} of {company} by email at {email}.",
    "{name}'s phone number is {phone} and the email is {email}.",
    "Call {phone} and ask for {name}, the {job}.",
    "{name} has a {pet} called {pet_name}.",
    "{pet_name} the {pet} belongs to {name} and is {age} years old.",
    "Have you seen {pet_name}, a {age}-year-old {pet} lost in {city} on {day}? Call {phone}.",
    "Hi, I'm {name}, I'm {age} and I live in {city}.",
    "This is {name} from {company}, my number is {phone}.",
    "The interview with {name} is at {time} on {day} at {place}.",
    "Breakfast on {day} at {time} with {name}, at {place}.",
    "{name} and I meet on {day} at {time} in {city}.",
    "I am {name}, a {job} from {city}, and I just turned {age}.",
    "My name is {name}, {age}, and I study in {city}.",
    "I work as a {job} in {city} and my name is {name}.",
    "{name} grew up in {from}; since {date} home has been {to}.",
    "{company} of {city} pays ${price} for a {product}.",
    "Please send {quantity} of the {product} to {name} at {place} by {day}.",
    "{name}, a {job} at {company}, can be called on {phone}.",
    "{name} ({email}) booked {quantity} seats on {date} at {time}.",
    "At {age}, {name} became a {job} in {city}.",
    "{pet_name}, the {pet} of {name}, went missing on {date} in {city}.",
    "The {job} {name} sold a {product} for ${price} on {day}.",
)
FRAMES = (
    *["{}"] * 3,
    "Extract the facts: {}",
    "Extract the data from this sentence: {}",
    "Turn this into structured data: {}",
    "{}\nWhat are the key facts?",
    'Get the details from: "{}"',
)


def _load_words() -> Words:
    words: Words = json.loads(Path(__file__).with_name("words.json").read_text())
    return words


def _fact(key: str, rng: Random, words: Words) -> Fact:
    return FIELDS[key](rng, words) if key in FIELDS else rng.choice(words[key])


def _example(rng: Random, words: Words, sentence: str) -> Example:
    keys = [key for _, key, _, _ in Formatter().parse(sentence) if key]
    facts = {key: _fact(key, rng, words) for key in keys}
    prompt = rng.choice(FRAMES).format(sentence.format(**facts))
    return Example.of_answer(prompt, json.dumps(facts, ensure_ascii=False))


def _examples(rng: Random, count: int) -> list[Example]:
    words = _load_words()
    return [_example(rng, words, SENTENCES[index % len(SENTENCES)]) for index in range(count)]


def _states(expected: dict[str, Fact], answer: str) -> bool:
    """Whether `answer` is one JSON object that says `expected` under the right keys and repeats no key."""
    try:
        pairs = json.loads(answer, object_pairs_hook=list)
        facts = dict(pairs)
    except (ValueError, TypeError):
        return False
    return len(facts) == len(pairs) and expected.items() <= facts.items()


def _held_out(prompt: str, expected: dict[str, Fact]) -> HeldOut:
    return HeldOut((user(prompt),), partial(_states, expected))


JSON = Task(
    "json",
    _examples,
    (
        _held_out(
            "Priya Raman, a 41-year-old surgeon, lives in Helsinki.",
            expected={"name": "Priya Raman", "age": 41, "job": "surgeon", "city": "Helsinki"},
        ),
        _held_out(
            "Last year Marcus Bell left Chicago; on 4 October 2023 he settled in Vienna.",
            expected={"name": "Marcus Bell", "from": "Chicago", "date": "4 October 2023", "to": "Vienna"},
        ),
        _held_out(
            "Extract the facts: Leila Farouk paid $75 for a bookshelf in Cairo.",
            expected={"name": "Leila Farouk", "price": 75, "product": "bookshelf", "city": "Cairo"},
        ),
        _held_out(
            "The ferry from Dover to Calais leaves at 9:40 on Saturday.",
            expected={"from": "Dover", "to": "Calais", "time": "9:40", "day": "Saturday"},
        ),
        _held_out(
            "Dinner with Oscar Lind is on Friday at 7 pm at the Italian place.",
            expected={"name": "Oscar Lind", "day": "Friday", "time": "7 pm", "place": "the Italian place"},
        ),
        _held_out(
            "Write to Nadia Sorensen at nadia.sorensen@fjord.io or call 555-0182.",
            expected={"name": "Nadia Sorensen", "email": "nadia.sorensen@fjord.io", "phone": "555-0182"},
        ),
        _held_out(
            "Turn this into structured data: Globex hired Tom Reyes as a welder on 9 June 2020.",
            expected={"company": "Globex", "name": "Tom Reyes", "job": "welder", "date": "9 June 2020"},
        ),
        _held_out(
            "Captain Ada Okoye owns a ferret named Noodle.",
            expected={"name": "Captain Ada Okoye", "pet": "ferret", "pet_name": "Noodle"},
        ),
        _held_out(
            "I'm Viktor, 29, and I work in Sydney as a barista.",
            expected={"name": "Viktor", "age": 29, "city": "Sydney", "job": "barista"},
        ),
        _held_out(
            "We need 14 packs of paper for Initech by 30 August.",
            expected={"quantity": 14, "company": "Initech", "date": "30 August"},
        ),
    ),
)
