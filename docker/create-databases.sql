-- Run once, by the postgres image, when its volume is empty: one database for each server.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
