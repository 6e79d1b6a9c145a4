"""The algebra of objectives: parts, terms, sums, `but`, `needs`."""

from unipo.objectives.advantages import *
from unipo.objectives.aggregates import *
from unipo.objectives.balance import *
from unipo.objectives.base import (
    Category,
    Either,
    Knob,
    Loss,
    Needs,
    Objective,
    Part,
    Rewarded,
    Rows,
    Signals,
    Sum,
    answers,
    demonstrations,
    everything,
    knobs_of,
    labels,
    nothing,
    number,
    own_pairs,
    pairs,
    parts_of,
    rollouts,
    with_settings,
)
from unipo.objectives.distributional import *
from unipo.objectives.groups import *
from unipo.objectives.hoisting import Stored, hoisted
from unipo.objectives.judging import *
from unipo.objectives.lists import *
from unipo.objectives.masks import *
from unipo.objectives.pathwise import *
from unipo.objectives.post_decision import *
from unipo.objectives.regression import *
from unipo.objectives.returns import *
from unipo.objectives.scores import *
from unipo.objectives.selections import *
from unipo.objectives.terms import *
from unipo.objectives.weighted_scores import *
from unipo.objectives.weights import *
