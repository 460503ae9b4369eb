package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/layerfs/layerfs"
	"github.com/layerfs/layerfs/internal/transfer"
)

// writeJSON writes a line. Names of files are not HTML.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// layerJSON is a layer: a line of ls, and the result of create and show.
type layerJSON struct {
	ID         string            `json:"id"`
	Parent     string            `json:"parent"` // empty for a base layer
	Created    time.Time         `json:"created"`
	ReadOnly   bool              `json:"read_only"` // created so
	Frozen     bool              `json:"frozen"`    // can no longer be written
	Children   int               `json:"children"`
	Incomplete string            `json:"incomplete,omitempty"` // why it is unusable
	Path       string            `json:"path"`                 // where mount shows it
	Mounted    bool              `json:"mounted"`
	Labels     map[string]string `json:"labels"`
	Quota      quotaJSON         `json:"quota"`
	Usage      *usageJSON        `json:"usage,omitempty"` // with show, and ls --usage
	Chain      []string          `json:"chain,omitempty"` // with show: its ancestors, nearest first
}

type quotaJSON struct {
	Bytes  int64 `json:"bytes"` // 0: no limit
	Inodes int64 `json:"inodes"`
}

type usageJSON struct {
	Bytes  int64 `json:"bytes"`
	Inodes int64 `json:"inodes"`
}

func newLayerJSON(i layerfs.Info) layerJSON {
	l := layerJSON{
		ID: i.ID, Parent: i.Parent, Created: i.Created, ReadOnly: i.ReadOnly, Frozen: i.Frozen(), Children: i.Children,
		Incomplete: i.Incomplete, Path: i.Path, Mounted: i.Mounted, Labels: i.Labels, Quota: quotaJSON(i.Quota),
	}
	if l.Labels == nil {
		l.Labels = map[string]string{}
	}
	if i.Usage != nil {
		l.Usage = &usageJSON{i.Usage.Bytes, i.Usage.Inodes}
	}
	return l
}

// appliedJSON is the result of apply and import.
type appliedJSON struct {
	ID      string `json:"id"`
	Digest  string `json:"digest"`  // of the uncompressed stream: the DiffID
	Size    int64  `json:"size"`    // of the uncompressed stream
	Bytes   int64  `json:"bytes"`   // of file content
	Entries int64  `json:"entries"` // of the stream
	Skipped int64  `json:"skipped"` // device nodes that were left out
}

func newAppliedJSON(id string, r layerfs.ApplyResult) appliedJSON {
	return appliedJSON{ID: id, Digest: r.Digest, Size: r.Size, Bytes: r.Bytes, Entries: r.Entries, Skipped: r.Skipped}
}

// idJSON is the result of umount, and a line of rm.
type idJSON struct {
	ID string `json:"id"`
}

// mountJSON is the result of mount.
type mountJSON struct {
	ID   string `json:"id"`
	Path string `json:"path"`
}

// diffJSON is the result of diff -o.
type diffJSON struct {
	ID          string `json:"id"`
	Base        string `json:"base"` // empty: the whole tree
	File        string `json:"file"`
	Bytes       int64  `json:"bytes"`  // of the file
	Digest      string `json:"digest"` // of the file; the DiffID if it is not compressed
	Compression string `json:"compression"`
}

// changeJSON is a line of changes.
type changeJSON struct {
	Kind      string `json:"kind"` // A, C or D
	Path      string `json:"path"`
	PathBytes []byte `json:"path_bytes,omitempty"` // if it is not UTF-8
}

func newChangeJSON(c layerfs.Change) changeJSON {
	j := changeJSON{Kind: c.Kind.String(), Path: c.Path}
	if !utf8.ValidString(c.Path) {
		j.PathBytes = []byte(c.Path)
	}
	return j
}

// copiedJSON is a line of copy.
type copiedJSON struct {
	ID       string `json:"id"`
	From     string `json:"from"`
	Parent   string `json:"parent"`
	Existed  bool   `json:"existed"`  // it was there already
	Verified bool   `json:"verified"` // both trees were compared
	Digest   string `json:"digest"`   // of the stream; empty if it existed
	Size     int64  `json:"size"`
}

func newCopiedJSON(l transfer.Layer) copiedJSON {
	return copiedJSON{ID: l.ID, From: l.From, Parent: l.Parent, Existed: l.Existed, Verified: l.Verified, Digest: l.Result.Digest, Size: l.Result.Size}
}

// sentJSON is the result of send -o.
type sentJSON struct {
	ID     string `json:"id"`
	From   string `json:"from"` // the ancestor it is relative to; empty for all of it
	File   string `json:"file"`
	Bytes  int64  `json:"bytes"`  // of the file
	Digest string `json:"digest"` // of the file
}

// receivedJSON is the result of receive.
type receivedJSON struct {
	ID     string `json:"id"`
	Parent string `json:"parent"`
	Driver string `json:"driver"` // whose format it was
	Bytes  int64  `json:"bytes"`  // of the stream
}

// migratedJSON is the result of migrate.
type migratedJSON struct {
	ID       string      `json:"id"`
	From     string      `json:"from"`
	Copied   []string    `json:"copied"` // ancestors that were copied too, base first
	There    []string    `json:"there"`  // ancestors that were there
	Rounds   []roundJSON `json:"rounds"` // the layer was frozen in the last one
	Frozen   float64     `json:"frozen"` // seconds
	Verified bool        `json:"verified"`
	Digest   string      `json:"digest,omitempty"`   // of the blocks of both, if they were compared
	Compared int64       `json:"compared,omitempty"` // bytes of blocks
}

type roundJSON struct {
	Bytes   int64   `json:"bytes"`
	Seconds float64 `json:"seconds"`
}

// seconds is a duration as it was.
func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// statusJSON is the result of status.
type statusJSON struct {
	Root     string           `json:"root"`
	Driver   string           `json:"driver"`
	Layers   int              `json:"layers"`
	Status   []statusItemJSON `json:"status"`
	MaxDepth int              `json:"max_depth"` // 0: no limit
	// Abilities are the fields of layerfs.Features by name.
	Abilities map[string]abilityJSON `json:"abilities"`
}

type statusItemJSON struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

type abilityJSON struct {
	Have   bool   `json:"have"`
	Reason string `json:"reason,omitempty"`
}

// probeJSON is a line of probe.
type probeJSON struct {
	Driver    string                 `json:"driver"`
	Works     bool                   `json:"works"`
	Reason    string                 `json:"reason,omitempty"` // why it does not
	Prior     bool                   `json:"prior"`            // the root has layers of it
	MaxDepth  int                    `json:"max_depth"`
	Abilities map[string]abilityJSON `json:"abilities"`
}

// problemJSON is a line of check.
type problemJSON struct {
	ID       string `json:"id,omitempty"`
	Path     string `json:"path,omitempty"`
	Reason   string `json:"reason"`
	Repair   string `json:"repair,omitempty"` // what would mend it
	Repaired bool   `json:"repaired"`
}

// printable escapes what could play tricks with a terminal.
func printable(s string) string {
	clean := utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) < 0
	if clean {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if r == '\n' || unicode.IsPrint(r) && r != utf8.RuneError {
			b.WriteRune(r)
		} else {
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
	}
	return b.String()
}

// printablePath quotes a path that would not be one line.
func printablePath(s string) string {
	if utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	return strconv.Quote(s)
}

// humanBytes prints a number of bytes with three digits: 0 B, 4.10 kB, 157 MB.
func humanBytes(n int64) string {
	f, unit := float64(n), "B"
	for _, u := range []string{"kB", "MB", "GB", "TB", "PB"} {
		if f < 999.5 && f > -999.5 {
			break
		}
		f, unit = f/1000, u
	}
	return threeDigits(f, unit == "B") + " " + unit
}

func threeDigits(f float64, whole bool) string {
	switch {
	case whole || f >= 99.95:
		return fmt.Sprintf("%.0f", f)
	case f >= 9.995:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.2f", f)
}

// humanTime prints a duration with three digits: 85.0 µs, 1.23 ms, 4.50 s.
func humanTime(d time.Duration) string {
	f, unit := float64(d.Nanoseconds())/1e3, "µs"
	for _, u := range []string{"ms", "s"} {
		if f < 999.5 {
			break
		}
		f, unit = f/1000, u
	}
	return threeDigits(f, false) + " " + unit
}

// entries says how many there are of what a stream has.
func entries(n int64) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}

// isTerminal reports whether a stream of this process is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
