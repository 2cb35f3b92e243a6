"""How much is measured where nobody says otherwise. Changing a number here changes every walk."""

CALIBRATION_TOKENS = 3072
CALIBRATION_LENGTH = 1024
HEALING_TOKENS = 20480  # and for statistics that one pass gives
EVALUATION_TOKENS = 8192
EVALUATION_LENGTH = 1024
COMPARED_TOKENS = 2048  # of each text, of every result
COMPARED_LENGTH = 512
COMPARED_HEALING_TOKENS = 8192  # for every result: the order of methods needs less than the best of one
COMPARED_QUESTIONS = 12  # of each probe
COMPARED_NEW_TOKENS = 32  # of each continuation that is looked at for repetition
TRAINING_TOKENS = 49152
TRAINING_LENGTH = 512
SELECTED_FROM = 4  # times the tokens of the training
TARGET_TOKENS = 32768
