package guest

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// PortName is the name of the virtio port that carries frames to the host.
const PortName = "layerfs.results"

// JobPath is where the image has the job, as JSON.
const JobPath = "/etc/layerfs-job.json"

// Job is what init does after boot.
type Job struct {
	Modules  []string  `json:"modules"`  // paths of module files, in load order
	Optional []string  `json:"optional"` // as above; one that does not load is reported and ignored
	Env      []string  `json:"env"`
	Commands []Command `json:"commands"`
	Scratch  bool      `json:"scratch"` // make a file system on the first disk
	Out      bool      `json:"out"`     // send what is left in OutDir
}

// OutDir is where a command leaves files for the host.
const OutDir = "/out"

// Command is one program to run in the guest.
type Command struct {
	Name    string   `json:"name"`
	Argv    []string `json:"argv"`
	Dir     string   `json:"dir"`
	Timeout int      `json:"timeout"` // seconds, after which it is killed
}

// Kind says what a frame holds.
type Kind byte

// The kinds of frames, in the order in which they are sent.
const (
	Hello  Kind = 'h' // init runs; the text is the kernel's release
	Note   Kind = 'n' // something to tell, as text
	Begin  Kind = 'b' // a command starts; the text is its index
	Output Kind = 'o' // what the command wrote
	End    Kind = 'e' // an [Ended] as JSON
	File   Kind = 'f' // part of a tar stream with OutDir
	Fatal  Kind = 'x' // init cannot go on, as text
	Done   Kind = 'd' // all is sent
)

// Ended is how a command ended.
type Ended struct {
	Index   int     `json:"index"`
	Code    int     `json:"code"`  // exit status; -1 if there is none
	Error   string  `json:"error"` // why there is none, or "signal: killed"
	Seconds float64 `json:"seconds"`
}

// maxFrame bounds a frame, so that a broken stream is noticed.
const maxFrame = 1 << 20

// FrameWriter writes frames: kind, length, data. It is safe for concurrent
// use, and each frame is written whole.
type FrameWriter struct {
	mu sync.Mutex
	w  io.Writer
}

// NewFrameWriter returns a writer of frames to w.
func NewFrameWriter(w io.Writer) *FrameWriter { return &FrameWriter{w: w} }

// Send writes data as one or more frames of the kind.
func (f *FrameWriter) Send(k Kind, data []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		part := data[:min(len(data), maxFrame/16)]
		data = data[len(part):]
		buf := make([]byte, 5, 5+len(part))
		buf[0] = byte(k)
		binary.LittleEndian.PutUint32(buf[1:], uint32(len(part)))
		if _, err := f.w.Write(append(buf, part...)); err != nil {
			return err
		}
		if len(data) == 0 {
			return nil
		}
	}
}

// SendJSON writes v as one frame.
func (f *FrameWriter) SendJSON(k Kind, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return f.Send(k, b)
}

// Stream returns a writer whose writes become frames of the kind.
func (f *FrameWriter) Stream(k Kind) io.Writer { return frameStream{f, k} }

type frameStream struct {
	f *FrameWriter
	k Kind
}

func (s frameStream) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return len(p), s.f.Send(s.k, p)
}

// ReadFrame reads one frame. It returns io.EOF at the end of the stream, and
// an error that says so if what it reads is no frame.
func ReadFrame(r io.Reader) (Kind, []byte, error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(h[1:])
	switch Kind(h[0]) {
	case Hello, Note, Begin, Output, End, File, Fatal, Done:
	default:
		return 0, nil, fmt.Errorf("guest: frame of unknown kind %q", h[0])
	}
	if n > maxFrame {
		return 0, nil, fmt.Errorf("guest: frame of %d bytes", n)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(r, data); err != nil {
		return 0, nil, io.ErrUnexpectedEOF
	}
	return Kind(h[0]), data, nil
}
