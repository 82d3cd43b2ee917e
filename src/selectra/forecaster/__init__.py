"""Forecasts of a table from one call: `Forecaster` for Python, `forecast_job` for the command line."""

from selectra.forecaster.estimator import Forecaster as Forecaster
from selectra.forecaster.job import ForecastJob as ForecastJob
from selectra.forecaster.job import forecast_job as forecast_job
