"""What the tools of the `tools` task do: how they are called, asked for, and what they answer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .task import Tool, made_up_word

Values = dict[str, Any]


@dataclass(frozen=True)
class Skill:
    """One thing that a tool can do; a slot `{x}` of a wording is an argument or a value of the result.

    `parameters` has a slot's names, of which a tool takes one, and its JSON schema.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: dict[str, tuple[tuple[str, ...], dict[str, Any]]]
    questions: tuple[str, ...]
    result: Callable[[Random, Values], Values]
    answer: str

    def tool(self, rng: Random) -> tuple[Tool, dict[str, str]]:
        """A tool with this skill, and the slot of each of its parameters."""
        slots = {rng.choice(names): slot for slot, (names, _) in self.parameters.items()}
        properties = {name: self.parameters[slot][1] for name, slot in slots.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": rng.choice(self.names), "parameters": parameters}
        if rng.random() < 0.7:
            function["description"] = rng.choice(self.descriptions)
        return {"type": "function", "function": function}, slots


_WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_name("words.json").read_text())
STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
SWITCH = {"type": "string", "enum": ["on", "off"]}
CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "INR", "BRL", "SEK")
SKIES = ("sunny", "cloudy", "raining", "snowing", "windy", "foggy")
OPERATORS = (("plus", "+"), ("minus", "-"), ("times", "*"), ("divided by", "/"), ("+", "+"), ("*", "*"))


def _known(key: str, share: float = 0.7) -> Callable[[Random], str]:
    """One of these words, or now and then one that exists nowhere."""
    return lambda rng: rng.choice(_WORDS[key]) if rng.random() < share else made_up_word(rng)


def _of(*values: str) -> Callable[[Random], str]:
    return lambda rng: rng.choice(values)


def _time(rng: Random) -> str:
    return f"{rng.randint(1, 23)}:{rng.choice(('00', '15', '30', '45'))}"


def _ticker(rng: Random) -> str:
    return "".join(rng.choices("ABCDEFGHIKLMNOPRSTVWXZ", k=rng.randint(3, 4)))


def _email(rng: Random) -> str:
    return f"{rng.choice(_WORDS['first']).lower()}@{rng.choice(('mail.com', 'example.org', 'post.net'))}"


def _title(rng: Random) -> str:
    what = rng.choice(("lunch", "dinner", "a meeting", "a call", "tennis", "coffee", "an interview"))
    return f"{what} with {_known('first')(rng)}"


_city, _name, _day = _known("city"), _known("first"), _known("day", 1.0)
DRAWS: dict[str, Callable[[Random], Any]] = {
    "city": _city,
    "other_city": _city,
    "day": _day,
    "time": _time,
    "title": _title,
    "minutes": lambda rng: rng.randint(1, 90),
    "amount": lambda rng: rng.choice((rng.randint(2, 900), rng.randint(20, 9000) / 10)),
    "from": _of(*CURRENCIES[::2]),
    "to": _of(*CURRENCIES[1::2]),
    "left": lambda rng: rng.randint(2, 999),
    "right": lambda rng: rng.randint(2, 99),
    "task": _of("call the bank", "water the plants", "buy milk", "feed the cat", "pay the rent", "read mail"),
    "email": _email,
    "text": _of(
        "I am late", "see you soon", "the report is ready", "thank you", "happy birthday", "good luck"
    ),
    "language": _of("French", "Spanish", "German", "Italian", "Polish", "Swahili", "Greek"),
    "phrase": _of(
        "good morning", "thank you", "where is the station", "one coffee", "I am hungry", "good night"
    ),
    "symbol": _ticker,
    "room": _of("kitchen", "bedroom", "living room", "bathroom", "hall", "garage", "office", "garden"),
    "state": _of("on", "off"),
    "degrees": lambda rng: rng.randint(14, 26),
    "song": lambda rng: f"{made_up_word(rng)} {rng.choice(('Road', 'Night', 'Love', 'River', 'Blues'))}",
    "query": lambda rng: (
        f"{rng.choice(('history of', 'recipes with', 'books about', 'news about'))} "
        + _known("pet")(rng).lower()
    ),
    "product": _known("product", 1.0),
    "quantity": lambda rng: rng.randint(2, 40),
    "cuisine": _of("Italian", "Indian", "Thai", "Mexican", "Greek", "Japanese", "vegan"),
    "name": _name,
    "order": lambda rng: rng.randint(1000, 99999),
}


def _done(_rng: Random, _values: Values) -> Values:
    return {"status": "ok"}


def _calculated(_rng: Random, values: Values) -> Values:
    left, right = values["left"], values["right"]
    results = {"+": left + right, "-": left - right, "*": left * right, "/": round(left / right, 2)}
    return {"value": results[values["sign"]]}


def _parameter(schema: dict[str, Any], *names: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, schema


_CITY = _parameter(STRING, "city", "location", "place", "town")
_DAY = _parameter(STRING, "day", "date", "when")
SKILLS = (
    Skill(
        ("get_weather", "current_weather", "weather", "lookup_weather", "get_current_weather"),
        ("Current weather of a city", "Get the weather", "The weather now"),
        {"city": _CITY},
        (
            "What is the weather in {city}?",
            "How is the weather in {city} today?",
            "What's the weather like in {city} right now?",
            "Is it raining in {city}?",
            "How warm is it in {city}?",
            "Do I need an umbrella in {city}?",
        ),
        lambda rng, _: {"temperature": rng.randint(-9, 38), "sky": rng.choice(SKIES)},
        "It is {temperature} degrees and {sky} in {city}.",
    ),
    Skill(
        ("get_forecast", "weather_forecast", "forecast"),
        ("Weather forecast of a day", "How the weather will be"),
        {"city": _CITY, "day": _DAY},
        (
            "What will the weather be in {city} on {day}?",
            "Will it rain in {city} on {day}?",
            "Forecast for {city}, {day}?",
        ),
        lambda rng, _: {"high": rng.randint(0, 38), "sky": rng.choice(SKIES)},
        "On {day} it will be {sky} in {city}, up to {high} degrees.",
    ),
    Skill(
        ("calculate", "calculator", "evaluate", "compute", "do_math"),
        ("Evaluates an arithmetic expression", "A calculator", "Calculate something"),
        {"expression": _parameter(STRING, "expression", "formula", "input")},
        (
            "What is {left} {operator} {right}?",
            "How much is {left} {operator} {right}?",
            "Calculate {left} {operator} {right}.",
        ),
        _calculated,
        "{expression} is {value}.",
    ),
    Skill(
        ("add", "add_numbers", "sum"),
        ("Adds two numbers", "The sum of two numbers"),
        {"left": _parameter(INTEGER, "a", "x", "first"), "right": _parameter(INTEGER, "b", "y", "second")},
        ("Add {left} and {right}.", "What is the sum of {left} and {right}?", "What is {left} plus {right}?"),
        lambda _, values: {"sum": values["left"] + values["right"]},
        "The sum of {left} and {right} is {sum}.",
    ),
    Skill(
        ("create_event", "add_event", "schedule_meeting", "calendar_add", "add_to_calendar"),
        ("Puts an event into the calendar", "Create a calendar event"),
        {
            "title": _parameter(STRING, "title", "event", "summary"),
            "day": _DAY,
            "time": _parameter(STRING, "time", "start", "at"),
        },
        (
            "Put {title} in my calendar on {day} at {time}.",
            "I have {title} on {day} at {time}, add it to my calendar.",
            "Schedule {title} for {day} at {time}.",
        ),
        _done,
        "I added {title} to your calendar: {day} at {time}.",
    ),
    Skill(
        ("list_events", "get_calendar", "calendar", "get_events"),
        ("Events of a day in the calendar", "Lists the events of a day"),
        {"day": _DAY},
        ("What do I have on {day}?", "Am I free on {day}?", "What is in my calendar on {day}?"),
        lambda rng, _: {"events": f"{_title(rng)} at {_time(rng)}"},
        "On {day} you have {events}.",
    ),
    Skill(
        ("set_timer", "start_timer", "timer"),
        ("Sets a timer", "Start a timer of some minutes"),
        {"minutes": _parameter(INTEGER, "minutes", "duration", "minutes")},
        (
            "Set a timer for {minutes} minutes.",
            "Wake me in {minutes} minutes.",
            "Start a {minutes} minute timer.",
        ),
        _done,
        "The timer is set for {minutes} minutes.",
    ),
    Skill(
        ("set_reminder", "remind_me", "create_reminder"),
        ("Reminds the user of something", "Create a reminder"),
        {"task": _parameter(STRING, "text", "task", "what"), "time": _parameter(STRING, "time", "at")},
        (
            "Remind me to {task} at {time}.",
            "At {time} I have to {task}, remind me.",
            "Please remind me at {time} to {task}.",
        ),
        _done,
        "I will remind you to {task} at {time}.",
    ),
    Skill(
        ("send_email", "email", "send_message"),
        ("Sends an email", "Send a message to somebody"),
        {
            "email": _parameter(STRING, "to", "recipient", "address"),
            "text": _parameter(STRING, "body", "text", "message"),
        },
        ("Write to {email}: {text}.", "Send an email to {email} saying {text}.", "Tell {email} that {text}."),
        _done,
        "I sent your message to {email}.",
    ),
    Skill(
        ("convert_currency", "exchange", "currency_converter"),
        ("Converts an amount between currencies", "Exchange rates"),
        {
            "amount": _parameter(NUMBER, "amount", "value"),
            "from": _parameter(STRING, "from", "source", "from_currency"),
            "to": _parameter(STRING, "to", "target", "to_currency"),
        },
        (
            "How much is {amount} {from} in {to}?",
            "Convert {amount} {from} to {to}.",
            "I have {amount} {from}. What is that in {to}?",
        ),
        lambda rng, _: {"converted": rng.randint(20, 90000) / 10},
        "{amount} {from} is {converted} {to}.",
    ),
    Skill(
        ("translate", "translate_text", "translator"),
        ("Translates a text", "Translate into another language"),
        {
            "phrase": _parameter(STRING, "text", "phrase"),
            "language": _parameter(STRING, "language", "target", "to"),
        },
        (
            "How do I say {phrase} in {language}?",
            'Translate "{phrase}" into {language}.',
            "What is {phrase} in {language}?",
        ),
        lambda rng, _: {"translation": f"{made_up_word(rng).lower()} {made_up_word(rng).lower()}"},
        'In {language} it is "{translation}".',
    ),
    Skill(
        ("get_stock_price", "stock_price", "quote"),
        ("Price of a share", "The price of a stock"),
        {"symbol": _parameter(STRING, "symbol", "ticker", "stock")},
        ("What is the price of {symbol}?", "How is {symbol} doing?", "What does a share of {symbol} cost?"),
        lambda rng, _: {"price": rng.randint(100, 90000) / 100},
        "{symbol} is at {price}.",
    ),
    Skill(
        ("set_light", "switch_light", "lights", "control_light"),
        ("Switches the light of a room", "Turn a light on or off"),
        {"room": _parameter(STRING, "room", "place"), "state": _parameter(SWITCH, "state", "switch")},
        (
            "Turn {state} the light in the {room}.",
            "Turn the {room} light {state}.",
            "Switch {state} the lights of the {room}, please.",
        ),
        _done,
        "The light in the {room} is {state}.",
    ),
    Skill(
        ("set_temperature", "thermostat", "set_heating"),
        ("Sets the heating of a room", "Set the thermostat"),
        {
            "room": _parameter(STRING, "room", "zone"),
            "degrees": _parameter(INTEGER, "degrees", "temperature"),
        },
        (
            "Set the {room} to {degrees} degrees.",
            "Make it {degrees} degrees in the {room}.",
            "Heat the {room} to {degrees} degrees.",
        ),
        _done,
        "The {room} is set to {degrees} degrees.",
    ),
    Skill(
        ("play_music", "play", "play_song"),
        ("Plays a song", "Play music"),
        {"song": _parameter(STRING, "song", "title", "track")},
        ("Play {song}.", "I want to hear {song}.", "Put on {song}, please."),
        _done,
        "Now playing {song}.",
    ),
    Skill(
        ("search", "web_search", "search_web"),
        ("Searches the web", "Search for something"),
        {"query": _parameter(STRING, "query", "q", "keywords")},
        ("Search for {query}.", "Find {query} on the web.", "Look up {query}."),
        lambda rng, _: {"title": f"{made_up_word(rng)} {made_up_word(rng)}"},
        "I found {title}.",
    ),
    Skill(
        ("get_time", "current_time", "world_clock"),
        ("Time in a city", "What time it is somewhere"),
        {"city": _CITY},
        ("What time is it in {city}?", "How late is it in {city}?", "Tell me the time in {city}."),
        lambda rng, _: {"local_time": _time(rng)},
        "It is {local_time} in {city}.",
    ),
    Skill(
        ("find_restaurant", "restaurants", "search_restaurants"),
        ("Finds restaurants", "Restaurants of a city"),
        {"cuisine": _parameter(STRING, "cuisine", "kind", "food"), "city": _CITY},
        (
            "Find a {cuisine} restaurant in {city}.",
            "Where can I eat {cuisine} food in {city}?",
            "I want {cuisine} food in {city}.",
        ),
        lambda rng, _: {"restaurant": f"{made_up_word(rng)} House"},
        "Try {restaurant}, a {cuisine} restaurant in {city}.",
    ),
    Skill(
        ("get_directions", "route", "directions"),
        ("The way from one place to another", "Directions between places"),
        {
            "city": _parameter(STRING, "origin", "from", "start"),
            "other_city": _parameter(STRING, "destination", "to", "end"),
        },
        (
            "How do I get from {city} to {other_city}?",
            "Show me the way from {city} to {other_city}.",
            "How far is it from {city} to {other_city}?",
        ),
        lambda rng, _: {"km": rng.randint(5, 4000), "hours": rng.randint(1, 40)},
        "From {city} to {other_city} it is {km} km, about {hours} hours.",
    ),
    Skill(
        ("order_product", "buy", "place_order", "order"),
        ("Orders products", "Buy something"),
        {
            "product": _parameter(STRING, "product", "item", "article"),
            "quantity": _parameter(INTEGER, "quantity", "count", "amount"),
        },
        (
            "Order {quantity} of the {product}.",
            "I want to buy {quantity} of the {product}.",
            "Please order the {product}, {quantity} pieces.",
        ),
        lambda rng, _: {"order": rng.randint(1000, 99999)},
        "I ordered {quantity} of the {product}, order {order}.",
    ),
    Skill(
        ("track_order", "order_status", "get_order"),
        ("State of an order", "Where an order is"),
        {"order": _parameter(INTEGER, "order_id", "order", "id", "number")},
        (
            "Where is my order {order}?",
            "What is the status of order {order}?",
            "Has order {order} been sent?",
        ),
        lambda rng, _: {"state": rng.choice(("sent", "delivered", "being packed", "delayed"))},
        "Order {order} is {state}.",
    ),
    Skill(
        ("find_contact", "phone_book", "get_phone_number"),
        ("Phone number of a person", "Looks up a contact"),
        {"name": _parameter(STRING, "name", "person", "contact")},
        ("What is the phone number of {name}?", "How can I call {name}?", "Give me {name}'s number."),
        lambda rng, _: {"phone": f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}"},
        "The number of {name} is {phone}.",
    ),
)


def draw_values(rng: Random, skill: Skill) -> Values:
    """A value for every slot of the skill's questions and arguments."""
    if "expression" in skill.parameters:
        operator, sign = rng.choice(OPERATORS)
        left, right = DRAWS["left"](rng), DRAWS["right"](rng)
        return {
            **{"left": left, "right": right, "operator": operator, "sign": sign},
            "expression": f"{left} {sign} {right}",
        }
    return {slot: DRAWS[slot](rng) for slot in skill.parameters}
