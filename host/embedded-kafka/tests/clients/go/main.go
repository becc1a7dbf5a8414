// Go's clients of Kafka on a broker: clients CLIENT BROKERS TOPIC.
//
// Each creates the topic with two partitions, produces to it in every codec, reads it in a group in two turns, does what
// an administrator does, and deletes it.
package main

import (
	"fmt"
	"log"
	"os"
	"slices"
	"strings"
	"time"
)

const patience = 30 * time.Second

var codecs = []string{"none", "gzip", "snappy", "lz4", "zstd"}

func main() {
	client, brokers, topic := os.Args[1], strings.Split(os.Args[2], ","), os.Args[3]
	clients := map[string]func([]string, string) error{
		"franz-go": franz,
		"kafka-go": kafkaGo,
		"sarama":   saramaOn,
	}
	if err := clients[client](brokers, topic); err != nil {
		log.Fatal(err)
	}
}

// What one codec's producer sends in a turn.
func values(turn int, codec string) []string {
	var values []string
	for i := range 20 {
		values = append(values, fmt.Sprintf("%d %s %d %s", turn, codec, i, strings.Repeat("x", 100)))
	}
	return values
}

func all(turn int) []string {
	var all []string
	for _, codec := range codecs {
		all = append(all, values(turn, codec)...)
	}
	return all
}

func same(seen, expected []string) error {
	slices.Sort(seen)
	slices.Sort(expected)
	if !slices.Equal(seen, expected) {
		return fmt.Errorf("%d records came, not the %d that were sent", len(seen), len(expected))
	}
	return nil
}

// Asks again until it is so: Apache Kafka answers before all of it knows of a change.
func until(what string, ask func() (bool, error)) error {
	end := time.Now().Add(patience)
	for {
		is, err := ask()
		if is || err != nil {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("still not so: %s", what)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
