"""Importing it limits the spinning of threads: Ray's workers import this package first, and torch reads it when it loads."""

from deepgrpo.threads import limit_spinning

limit_spinning()
