//go:build !linux

package main

import "github.com/layerfs/layerfs"

// No driver of this system has streams of its own.

func streamerOf(d layerfs.Driver) (streamer, error) { return nil, errNoStreamer(d) }

func migratorOf(d layerfs.Driver) (migrator, error) { return nil, errNoMigrator(d) }
