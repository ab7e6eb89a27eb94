"""Errors about data, made to be read by people: a code to look up, the place, the cause and the fix."""
from __future__ import annotations

CODES = {
    'E101': 'a file is truncated or damaged',
    'E102': 'no bag here, or its metadata is unusable',
    'E103': 'a storage, compression or message encoding that is not read',
    'E104': 'a message type has no definition',
    'E105': 'a message cannot be deserialised',
    'E201': 'a topic of the contract is absent, ambiguous or of another type',
    'E202': 'a stream is silent',
    'E203': 'joints or fields are missing or doubled',
    'E204': 'a stamp is absent, or the clocks disagree',
    'E205': 'a value is not finite',
    'E206': 'a gap is too long to be filled',
    'E207': 'too few usable rows',
    'E208': 'an image cannot be decoded or encoded',
    'E209': 'no command to label with',
    'E210': 'episode markers that make no episodes',
    'E211': 'a stream comes at another rate than declared',
    'E212': 'no contract in the bags, or several',
    'E301': 'the output holds something else',
    'E302': 'a dataset cannot be read',
    'E303': 'content that does not fit the dataset',
    'E304': 'episodes that failed the quality check',
    'E305': 'the disk is full, or cannot be written to',
    'E401': 'a file to import cannot be read',
    'E402': 'a mapping does not fit the file',
    'E403': 'a folder that is no LeRobot dataset',
    'E501': 'joints and links of the contract are not in its description',
    'E502': 'limits are wider than those of the description',
    'E503': 'values in another unit, or outside the limits',
    'E504': 'publisher and subscription with incompatible QoS',
    'E505': 'several publishers where one is meant',
    'E506': 'nobody listens to an output',
    'E507': 'max_age is shorter than the time between samples',
    'E508': 'images of another size or shape',
    'E509': 'contracts differ',
    'E510': 'policy steps of another length',
    'E511': 'an observed feature is missing, of another shape, or in another order',
    'E512': 'joints of the action are others, or in another order',
    'E513': 'actions are labelled otherwise',
    'E514': 'a checkpoint was trained on another dataset',
    'E515': 'values are far from those that the policy was trained on',
}
"""Every code with what it stands for."""


class DataError(ValueError):
    """Data that cannot be used: `[code ]place: cause; fix`."""

    def __init__(self, message: str, code: str = ''):
        """code: one of CODES, or none where there is nothing to look up."""
        super().__init__(f'{code} {message}' if code else message)
        self.message = message
        self.code = code

    def at(self, place: object) -> DataError:
        """The same error, of a place that was not known where it arose."""
        return type(self)(f'{place}: {self.message}', self.code)


class BagError(DataError):
    """A bag that cannot be written or read."""
