// Command gotest runs go test and prints what go test prints, and adds the
// tests that were skipped, with their reasons, to a file:
//
//	gotest -run NAME -skips FILE -- ARGUMENTS OF GO TEST
//
// The exit status is that of go test.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
)

func main() {
	name := flag.String("run", "", "`name` of this run, put before each skipped test")
	skips := flag.String("skips", "", "`file` that skipped tests are added to")
	flag.Parse()
	code, err := run(*name, *skips, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		os.Exit(2)
	}
	os.Exit(code)
}

func run(name, skips string, args []string) (code int, err error) {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	p := printer{w: os.Stdout, output: map[string][]string{}}
	if err := p.read(events); err != nil {
		return 0, err
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	if skips != "" && len(p.skipped) > 0 {
		f, err := os.OpenFile(skips, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
		if err != nil {
			return 0, err
		}
		for _, line := range p.skipped {
			fmt.Fprintf(f, "%s: %s\n", name, line)
		}
		if err := f.Close(); err != nil {
			return 0, err
		}
	}
	return cmd.ProcessState.ExitCode(), nil
}

// event is one line of go test -json; see go doc test2json.
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
}

// printer turns events back into the text of a go test without -v.
type printer struct {
	w       io.Writer
	output  map[string][]string // by package and top-level test, until it ends
	skipped []string
}

// location is the file and line before a test's message.
var location = regexp.MustCompile(`^\s*[\w.-]+\.go:\d+: `)

func (p *printer) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil {
				// Not an event: what go itself has to say.
				fmt.Fprintf(p.w, "%s", line)
			} else {
				p.event(e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (p *printer) event(e event) {
	top, _, sub := strings.Cut(e.Test, "/")
	key := e.Package + " " + top
	own := e.Package + " " + e.Test
	switch e.Action {
	case "build-output":
		fmt.Fprint(p.w, e.Output)
	case "output":
		if e.Test == "" {
			// The PASS before the ok line is only printed with -v.
			if e.Output != "PASS\n" {
				fmt.Fprint(p.w, e.Output)
			}
			return
		}
		if strings.HasPrefix(e.Output, "=== ") {
			return
		}
		p.output[key] = append(p.output[key], e.Output)
		if sub {
			p.output[own] = append(p.output[own], e.Output)
		}
	case "skip":
		if e.Test == "" {
			return // a package without tests
		}
		p.skipped = append(p.skipped, fmt.Sprintf("%s %s: %s", e.Package, e.Test, reason(p.output[own])))
		delete(p.output, own)
	case "pass", "fail":
		if e.Test == "" {
			return
		}
		if !sub && e.Action == "fail" {
			for _, text := range p.output[key] {
				if !strings.HasPrefix(strings.TrimSpace(text), "--- PASS: ") {
					fmt.Fprint(p.w, text)
				}
			}
		}
		delete(p.output, own)
	}
}

// reason returns the last message a skipped test gave, on one line.
func reason(output []string) string {
	text := "no reason given"
	for i, line := range output {
		if !location.MatchString(line) {
			continue
		}
		text = strings.TrimSpace(location.ReplaceAllString(line, ""))
		for _, more := range output[i+1:] {
			if location.MatchString(more) || strings.HasPrefix(strings.TrimSpace(more), "--- ") {
				break
			}
			text += " " + strings.TrimSpace(more)
		}
	}
	return text
}
