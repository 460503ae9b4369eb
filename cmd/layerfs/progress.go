package main

import (
	"io"
	"time"

	"github.com/schollz/progressbar/v3"

	"github.com/layerfs/layerfs"
)

// meter is a progress bar, or nothing where nobody would see one.
type meter struct{ bar *progressbar.ProgressBar }

// meter starts a bar; total is in bytes, 0 if it is unknown.
func (a *app) meter(what string, total int64) *meter {
	if a.quiet || a.json || !isTerminal(a.err) {
		return &meter{}
	}
	if total == 0 {
		total = -1
	}
	return &meter{progressbar.NewOptions64(total,
		progressbar.OptionSetWriter(a.err),
		progressbar.OptionSetDescription(what),
		progressbar.OptionShowBytes(true),
		progressbar.OptionShowTotalBytes(total > 0),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionSetWidth(30),
		progressbar.OptionSetSpinnerChangeInterval(0), // no goroutine of its own
		progressbar.OptionClearOnFinish(),
	)}
}

// set shows how much is done. A bar that cannot be drawn is no reason to stop.
func (m *meter) set(p layerfs.Progress) {
	if m.bar == nil {
		return
	}
	if p.Total > 0 && p.Total != m.bar.GetMax64() {
		m.bar.ChangeMax64(p.Total)
	}
	_ = m.bar.Set64(p.Bytes)
}

// Write counts. An error of the bar must not become one of the stream.
func (m *meter) Write(p []byte) (int, error) {
	_ = m.bar.Add64(int64(len(p)))
	return len(p), nil
}

// reader counts what is read.
func (m *meter) reader(r io.Reader) io.Reader {
	if m.bar == nil {
		return r
	}
	return io.TeeReader(r, m)
}

// writer counts what is written.
func (m *meter) writer(w io.Writer) io.Writer {
	if m.bar == nil {
		return w
	}
	return io.MultiWriter(w, m)
}

// meters shows one bar after the other.
type meters struct {
	a    *app
	what string
	bar  *meter // or nil between two
}

// set shows how much of what is done; a new bar begins with a new what.
func (m *meters) set(what string, p layerfs.Progress) {
	if m.bar == nil || m.what != what {
		m.done()
		m.bar, m.what = m.a.meter(what, p.Total), what
	}
	m.bar.set(p)
}

// done removes the bar that is shown; the next set shows a new one.
func (m *meters) done() {
	if m.bar != nil {
		m.bar.done()
	}
	m.bar = nil
}

// done removes the bar.
func (m *meter) done() {
	if m.bar != nil {
		_ = m.bar.Clear()
		_ = m.bar.Exit()
	}
}
