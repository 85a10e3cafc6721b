"""What all classes of parameters share."""

from pydantic import BaseModel, ConfigDict


class Parameters(BaseModel):
    """Base of the parameter classes: frozen; unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
