package main

import (
	"fmt"
	"io"
	"slices"
	"time"
)

// demoJSON is the result of demo. Times are in nanoseconds, sizes in bytes.
type demoJSON struct {
	Host struct {
		Kernel     string `json:"kernel"`
		CPUs       int    `json:"cpus"`
		User       int    `json:"uid"`
		FileSystem string `json:"file_system"`
		Driver     string `json:"driver"`
		Durability string `json:"durability"`
		Load       string `json:"load,omitempty"` // of the last minute
	} `json:"host"`
	Import struct {
		From    string        `json:"from"`
		Entries int64         `json:"entries"`
		Bytes   int64         `json:"bytes"` // of content
		Time    time.Duration `json:"time_ns"`
		Digest  string        `json:"digest"`
	} `json:"import"`
	Layer struct {
		Entries int64         `json:"entries"`
		Time    time.Duration `json:"time_ns"`
		Digest  string        `json:"digest"`
	} `json:"layer"`
	Containers struct {
		Count  int           `json:"count"`
		Median time.Duration `json:"median_ns"` // create and mount one
		Min    time.Duration `json:"min_ns"`
		Max    time.Duration `json:"max_ns"`
		Bytes  int64         `json:"bytes"` // all of them together, on disk
		Stop   time.Duration `json:"stop_median_ns"`
	} `json:"containers"`
	FullCopy struct {
		Time  time.Duration `json:"time_ns"` // one copy
		Bytes int64         `json:"bytes"`   // one copy, on disk
	} `json:"full_copy"`
	Changes struct {
		Steps  []demoStep    `json:"steps"`
		List   []changeJSON  `json:"list"`
		Time   time.Duration `json:"time_ns"`
		Oracle bool          `json:"same_as_double_walk"`
	} `json:"changes"`
	Diff struct {
		Time        time.Duration `json:"time_ns"`
		Bytes       int64         `json:"bytes"` // zstd
		ApplyTime   time.Duration `json:"apply_time_ns"`
		Differences int           `json:"differences"` // between the two trees
	} `json:"diff"`
	Memory *demoMemory `json:"memory,omitempty"` // only where it could be measured
}

// demoStep is one thing that was done in the container.
type demoStep struct {
	What string        `json:"what"`
	Path string        `json:"path"`
	Time time.Duration `json:"time_ns"`
}

// demoMemory is how much of the tree is in the page cache as seen from a
// container that has read nothing, before and after another has read all.
type demoMemory struct {
	Bytes      int64         `json:"bytes"` // of the files that were read
	Before     int64         `json:"before"`
	After      int64         `json:"after"`
	Cold       time.Duration `json:"cold_read_ns"` // by the first container
	Warm       time.Duration `json:"warm_read_ns"` // by the second, afterwards
	CopyBefore int64         `json:"copy_before"`  // the same between two full copies
	CopyAfter  int64         `json:"copy_after"`
}

// printer prints lines and keeps the first error.
type printer struct {
	w   io.Writer
	off bool
	err error
}

func (p *printer) say(format string, args ...any) {
	if p.off || p.err != nil {
		return
	}
	_, p.err = fmt.Fprintf(p.w, "  "+format+"\n", args...)
}

func (p *printer) section(format string, args ...any) {
	if p.off || p.err != nil {
		return
	}
	_, p.err = fmt.Fprintf(p.w, "\n"+format+"\n", args...)
}

// median, minimum and maximum; times is not empty and gets sorted.
func spread(times []time.Duration) (median, least, most time.Duration) {
	slices.Sort(times)
	return times[len(times)/2], times[0], times[len(times)-1]
}

// times says how many times larger a is than b.
func times(a, b float64) string {
	if b <= 0 || a <= 0 {
		return "-"
	}
	return threeDigits(a/b, false)
}
